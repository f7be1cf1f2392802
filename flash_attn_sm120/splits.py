"""Into how many parts the keys of a decode call are cut at most, each the work of other thread blocks. Pure Python."""

from __future__ import annotations

from flash_attn_sm120.dispatch import MAX_SPLITS, Plan

MIN_KEYS = 256  # of a part; below, combining costs more than it gains


def num_splits(plan: Plan, sms: int, batch: int, heads_kv: int, rows: int, max_seqlen_k: int) -> int:
    """The size of the first dimension of the partials, as many as fill the GPU; 1: whole.

    rows: of a sequence and KV head, max_seqlen_q * heads // heads_kv. max_seqlen_k: an upper bound.
    """
    blocks = max(1, batch * heads_kv * -(-rows // plan.tile_m))
    return max(1, min(sms * plan.blocks_per_sm // blocks, -(-max_seqlen_k // MIN_KEYS), MAX_SPLITS))


def tickets(plan: Plan, heads_kv: int, heads: int, q_shape: tuple[int, ...], batch: int) -> int:
    """How many tickets a launch counts with. q_shape: (batch, seqlen_q, heads, d) or (total_q, heads, d)."""
    heads_per_kv = heads // heads_kv
    if len(q_shape) == 3:
        return (q_shape[0] * heads_per_kv // plan.tile_m + batch) * heads_kv
    return batch * -(-q_shape[1] * heads_per_kv // plan.tile_m) * heads_kv
