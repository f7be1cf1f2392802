"""The decode kernel's tiles, and what lies where in a block's shared memory. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from flash_attn_sm120.problem import ELEMENT_BYTES, AttentionProblem, padded


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A row of a tile table: for head dims up to (head_dim, head_dim_v). stages: tiles of K or V in flight a warp."""

    head_dim: int
    head_dim_v: int
    tile_m: int
    tile_n: int
    num_warps: int
    stages: int
    blocks_per_sm: int


# tile_n: keys of a granule; about 64 KB in flight on an SM are enough, and more make the last ones late. Two blocks an
# SM hide one another's ends where whole sequences follow one another; parts of one fill each SM once, and fewer of them
# are sooner combined. Evidence: benchmarks/NOTES.md, "Decode".
DECODE_TILES = (
    DecodeRow(64, 64, tile_m=16, tile_n=32, num_warps=4, stages=2, blocks_per_sm=2),
    DecodeRow(128, 128, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=2),
    DecodeRow(192, 192, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=1),
    DecodeRow(256, 256, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=1),
)
DECODE_SPLIT_TILES = (
    DecodeRow(64, 64, tile_m=16, tile_n=32, num_warps=8, stages=2, blocks_per_sm=1),
    DecodeRow(128, 128, tile_m=16, tile_n=32, num_warps=4, stages=2, blocks_per_sm=1),
    DecodeRow(192, 192, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=1),
    DecodeRow(256, 256, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=1),
)
DECODE_FP8_TILES = (
    DecodeRow(64, 64, tile_m=16, tile_n=32, num_warps=4, stages=3, blocks_per_sm=2),
    DecodeRow(128, 128, tile_m=16, tile_n=32, num_warps=4, stages=2, blocks_per_sm=2),
    DecodeRow(192, 192, tile_m=16, tile_n=32, num_warps=4, stages=3, blocks_per_sm=1),
    DecodeRow(256, 256, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=1),
)
DECODE_FP8_SPLIT_TILES = (
    DecodeRow(64, 64, tile_m=16, tile_n=32, num_warps=8, stages=3, blocks_per_sm=1),
    DecodeRow(128, 128, tile_m=16, tile_n=32, num_warps=8, stages=2, blocks_per_sm=1),
    DecodeRow(192, 192, tile_m=16, tile_n=32, num_warps=4, stages=3, blocks_per_sm=1),
    DecodeRow(256, 256, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=1),
)


NOTE_BYTES = 32  # of a warp


def decode_row(problem: AttentionProblem) -> DecodeRow:
    if problem.kv_dtype:
        table = DECODE_FP8_SPLIT_TILES if problem.split else DECODE_FP8_TILES
    else:
        table = DECODE_SPLIT_TILES if problem.split else DECODE_TILES
    return next(row for row in table if problem.head_dim <= row.head_dim and problem.head_dim_v <= row.head_dim_v)


@dataclass(frozen=True, slots=True)
class DecodeMemory:
    """Shared memory of a decode block. Columns are 16-bit ones: an 8-bit row counts half, padded to whole chunks.

    A warp's ring of `ring_bytes` holds `stages` tiles of K or V, and in the end its O in rows of staged_row_bytes; from
    q_offset on q_steps k steps of its Q, where registers don't hold all of them.
    notes_offset: where each warp writes its statistics down, note_offset where each writes the block's tile down.
    """

    columns_k: int
    columns_v: int
    columns_out: int
    staged_row_bytes: int
    q_offset: int
    q_steps: int
    ring_bytes: int
    notes_offset: int
    note_offset: int
    bytes: int


def decode_memory(problem: AttentionProblem, tile_m: int, tile_n: int, num_warps: int, stages: int) -> DecodeMemory:
    if problem.kv_dtype:
        columns_k, columns_out = (-(-cols // 64) * 64 for cols in (problem.head_dim, problem.head_dim_v))
        columns_k, columns_v = columns_k // 2, columns_out // 2
    else:
        columns_k, columns_v = padded(problem.head_dim), padded(problem.head_dim_v)
        columns_out = columns_v
    # rows fall in different banks: eight of 16-bit keys, whose lanes store two columns each, two of 8-bit ones
    staged_row_bytes = (columns_out + (16 if problem.kv_dtype else 8)) * 4
    tile_bytes = ELEMENT_BYTES * tile_n * max(columns_k, columns_v)
    q_offset = max(stages * tile_bytes, tile_m * staged_row_bytes)
    q_steps = 0
    if max(problem.head_dim, problem.head_dim_v) > 192:
        q_steps = 12 if problem.kv_dtype else 1
    ring_bytes = q_offset + q_steps * tile_m * 32
    notes = num_warps * ring_bytes
    note = notes + num_warps * tile_m * 8
    end = note + num_warps * NOTE_BYTES
    columns = (columns_k, columns_v, columns_out)
    return DecodeMemory(*columns, staged_row_bytes, q_offset, q_steps, ring_bytes, notes, note, end)
