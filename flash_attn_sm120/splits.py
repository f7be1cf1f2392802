"""Into how many parts the keys of a decode call are cut, each the work of other thread blocks. Pure Python."""

from __future__ import annotations

MAX_SPLITS = 128
MIN_KEYS = 256  # of a part; below, combining costs more than it gains


def num_splits_for(sm_count: int, batch: int, heads_kv: int, m_tiles: int, max_seqlen_k: int) -> int:
    """How many parts fill the GPU. m_tiles: tiles of rows of a sequence and KV head; max_seqlen_k: keys to look at."""
    whole_tiles = max(1, batch * heads_kv * m_tiles)
    by_keys = -(-max_seqlen_k // MIN_KEYS)
    return max(1, min(sm_count // whole_tiles, by_keys, MAX_SPLITS))


def keys_in_sight(max_seqlen_k: int, rows: int, window_left: int, window_right: int, attention_chunk: int) -> int:
    """An upper bound of the keys that `rows` neighbouring rows see together. attention_chunk: 0 without."""
    sight = min(max_seqlen_k, rows + window_left + window_right)
    if attention_chunk:
        sight = min(sight, attention_chunk * (-(-rows // attention_chunk) + 1))
    return sight
