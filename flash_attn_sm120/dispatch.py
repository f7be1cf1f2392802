"""choose(problem) -> Plan: which kernel and which tile, from SM120's limits and a table of what measured best.

Pure Python, imports neither torch nor cutlass.
"""

from __future__ import annotations

from dataclasses import dataclass

from flash_attn_sm120.problem import DTYPES, FP8_DTYPES, MASKS, AttentionProblem, padded

ELEMENT_BYTES = 2
BARRIER_BYTES = 64  # mbarriers, behind the note
MAX_SPLITS = 64  # parts of a sequence in a decode
TILE_NOTE_BYTES = 48  # what a thread block writes down instead of keeping it in registers, behind the tiles


@dataclass(frozen=True, slots=True)
class Plan:
    """How a problem is computed: the kernel and its tile.

    num_warps: those that multiply; loading_warps: those that only load, one of them working. stages: K and V tiles in
    flight. blocks_per_sm: thread blocks that an SM of SM120 is to hold at a time, within the limits of occupancy.py.
    smem_bytes: dynamic shared memory of a block.
    """

    kernel: str
    tile_m: int
    tile_n: int
    num_warps: int
    stages: int
    blocks_per_sm: int
    smem_bytes: int
    loading_warps: int = 0

    @property
    def note_offset(self) -> int:
        """Where in shared memory the tile's note lies."""
        return self.smem_bytes - TILE_NOTE_BYTES - BARRIER_BYTES

    @property
    def barrier_offset(self) -> int:
        """Where the mbarriers lie."""
        return self.smem_bytes - BARRIER_BYTES


@dataclass(frozen=True, slots=True)
class TileRow:
    """A row of a tile table: serves head dims up to (head_dim, head_dim_v)."""

    head_dim: int
    head_dim_v: int
    tile_m: int
    tile_n: int
    num_warps: int
    stages: int
    blocks_per_sm: int


# 32 rows a warp where registers and shared memory allow it (half the shared-memory reads), 16 above head_dim 128.
# Evidence: benchmarks/NOTES.md, "Tiles of the plain kernel" and "The TMA kernel".
FORWARD_TILES = (
    TileRow(64, 64, tile_m=128, tile_n=64, num_warps=4, stages=2, blocks_per_sm=2),
    TileRow(96, 96, tile_m=128, tile_n=64, num_warps=4, stages=1, blocks_per_sm=2),
    TileRow(128, 128, tile_m=128, tile_n=32, num_warps=4, stages=1, blocks_per_sm=2),
    TileRow(192, 192, tile_m=128, tile_n=64, num_warps=8, stages=1, blocks_per_sm=1),
    TileRow(256, 256, tile_m=128, tile_n=32, num_warps=8, stages=1, blocks_per_sm=1),
)
FORWARD_TMA_TILES = (
    TileRow(64, 64, tile_m=128, tile_n=64, num_warps=4, stages=1, blocks_per_sm=2),
    TileRow(96, 96, tile_m=128, tile_n=64, num_warps=4, stages=1, blocks_per_sm=2),
    TileRow(128, 128, tile_m=128, tile_n=32, num_warps=4, stages=1, blocks_per_sm=2),
    TileRow(192, 192, tile_m=128, tile_n=64, num_warps=8, stages=1, blocks_per_sm=1),
    TileRow(256, 256, tile_m=128, tile_n=32, num_warps=8, stages=1, blocks_per_sm=1),
)
# tile_n: keys of a granule; 32 KB and more in flight on an SM decide. Two blocks an SM hide one another's ends where
# whole sequences follow one another; parts of one fill each SM once, and fewer of them are sooner combined.
# Evidence: benchmarks/NOTES.md, "Decode".
DECODE_TILES = (
    TileRow(64, 64, tile_m=16, tile_n=32, num_warps=4, stages=3, blocks_per_sm=2),
    TileRow(128, 128, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=2),
    TileRow(192, 192, tile_m=16, tile_n=16, num_warps=4, stages=4, blocks_per_sm=1),
    TileRow(256, 256, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=1),
)
DECODE_SPLIT_TILES = (
    TileRow(64, 64, tile_m=16, tile_n=32, num_warps=8, stages=3, blocks_per_sm=1),
    TileRow(128, 128, tile_m=16, tile_n=32, num_warps=4, stages=3, blocks_per_sm=1),
    TileRow(192, 192, tile_m=16, tile_n=16, num_warps=4, stages=4, blocks_per_sm=1),
    TileRow(256, 256, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=1),
)
DECODE_FP8_TILES = (
    TileRow(64, 64, tile_m=16, tile_n=32, num_warps=4, stages=5, blocks_per_sm=2),
    TileRow(128, 128, tile_m=16, tile_n=32, num_warps=4, stages=3, blocks_per_sm=2),
    TileRow(192, 192, tile_m=16, tile_n=32, num_warps=4, stages=3, blocks_per_sm=1),
    TileRow(256, 256, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=1),
)
DECODE_FP8_SPLIT_TILES = (
    TileRow(64, 64, tile_m=16, tile_n=32, num_warps=8, stages=5, blocks_per_sm=1),
    TileRow(128, 128, tile_m=16, tile_n=32, num_warps=8, stages=3, blocks_per_sm=1),
    TileRow(192, 192, tile_m=16, tile_n=32, num_warps=4, stages=3, blocks_per_sm=1),
    TileRow(256, 256, tile_m=16, tile_n=16, num_warps=4, stages=3, blocks_per_sm=1),
)
TILES = {"forward": FORWARD_TILES, "forward_tma": FORWARD_TMA_TILES}
LOADING_WARPS = {
    "forward": 0,
    "forward_tma": 4,
    "decode": 0,
}  # four, as registers change hands between groups of four warps


def smem_bytes(problem: AttentionProblem, row: TileRow) -> int:
    """Q, `stages` tiles of K and of V, a note and the barriers; out takes the tiles' place at the end."""
    if problem.decode:
        return decode_memory(problem, row.tile_m, row.tile_n, row.num_warps, row.stages).bytes
    d, dv = padded(problem.head_dim), padded(problem.head_dim_v)
    inputs = row.tile_m * d + row.stages * row.tile_n * (d + dv)
    return ELEMENT_BYTES * max(inputs, row.tile_m * dv) + TILE_NOTE_BYTES + BARRIER_BYTES


@dataclass(frozen=True, slots=True)
class DecodeMemory:
    """Shared memory of a decode block. Columns are 16-bit ones: an 8-bit row counts half, padded to whole chunks.

    A warp's ring of `ring_bytes` holds `stages` tiles of K or V, and in the end its O in rows of staged_row_bytes; from
    q_offset on q_steps k steps of its Q, where registers don't hold all of them.
    notes_offset: where each warp writes its statistics down, note_offset where the block writes its tile down.
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
    staged_row_bytes = (columns_out + 8) * 4  # eight rows fall in different banks
    tile_bytes = ELEMENT_BYTES * tile_n * max(columns_k, columns_v)
    q_offset = max(stages * tile_bytes, tile_m * staged_row_bytes)
    q_steps = 0
    if max(problem.head_dim, problem.head_dim_v) > 192:
        q_steps = 12 if problem.kv_dtype else 1
    ring_bytes = q_offset + q_steps * tile_m * 32
    notes = num_warps * ring_bytes
    note = notes + num_warps * tile_m * 8
    columns = (columns_k, columns_v, columns_out)
    return DecodeMemory(*columns, staged_row_bytes, q_offset, q_steps, ring_bytes, notes, note, note + 32)


def can_implement(kernel: str, problem: AttentionProblem, arch: str) -> bool:
    """Whether the kernel gives right results for the problem on a target such as "sm_120a"."""
    if kernel == "decode" or problem.decode:
        return kernel == "decode" and problem.decode
    if kernel == "forward":
        return True
    major = int("".join(filter(str.isdigit, arch))) // 10
    whole_boxes = problem.head_dim % 32 == 0 and problem.head_dim_v % 32 == 0
    return major >= 9 and not problem.varlen and problem.tma_strides and whole_boxes


def tiles_for(kernel: str, problem: AttentionProblem) -> tuple[TileRow, ...]:
    if kernel != "decode":
        return TILES[kernel]
    if problem.kv_dtype:
        return DECODE_FP8_SPLIT_TILES if problem.split else DECODE_FP8_TILES
    return DECODE_SPLIT_TILES if problem.split else DECODE_TILES


def plan_for(kernel: str, problem: AttentionProblem) -> Plan:
    """The kernel's plan, whether or not the dispatcher would take it."""
    row = next(
        row
        for row in tiles_for(kernel, problem)
        if problem.head_dim <= row.head_dim and problem.head_dim_v <= row.head_dim_v
    )
    tile = (row.tile_m, row.tile_n, row.num_warps, row.stages, row.blocks_per_sm)
    return Plan(kernel, *tile, smem_bytes(problem, row), LOADING_WARPS[kernel])


def choose(problem: AttentionProblem, arch: str = "sm_120a") -> Plan:
    """The plan for a problem: TMA where it may be used, as it measured faster for every head_dim; tiles are SM120's
    whatever the target."""
    if problem.decode:
        return plan_for("decode", problem)
    kernel = "forward_tma" if can_implement("forward_tma", problem, arch) else "forward"
    return plan_for(kernel, problem)


HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


def variants() -> list[AttentionProblem]:
    """What `compile`, the demo and the tests build: one problem for each way in which the machine code can differ."""
    problems = []
    packed = {"packed_q": True, "packed_k": True}
    for head_dim, head_dim_v in HEAD_DIMS:
        for mask in MASKS:
            problems.append(AttentionProblem("bfloat16", head_dim, head_dim_v, mask=mask, lse=True))
        problems.append(AttentionProblem("bfloat16", head_dim, head_dim_v, mask="causal", lse=True, **packed))
    for mask in MASKS:
        problems.append(AttentionProblem("float16", 128, 128, mask=mask))
        problems.append(AttentionProblem("bfloat16", 128, 128, mask=mask, softcap=True, lse=True))
        problems.append(AttentionProblem("float16", 128, 128, mask=mask, lse=True, tma_strides=False))
        problems.append(AttentionProblem("bfloat16", 128, 128, mask=mask, softcap=True, tma_strides=False))
        problems.append(AttentionProblem("bfloat16", 128, 128, mask=mask, **packed))
        problems.append(AttentionProblem("float16", 128, 128, mask=mask, lse=True, seqused_q=True, seqused_k=True))
        problems.append(AttentionProblem("bfloat16", 128, 128, mask=mask, packed_q=True, seqused_k=True, lse=True))
    problems.append(AttentionProblem("bfloat16", 256, 256, mask="local", softcap=True, lse=True))
    problems.append(AttentionProblem("bfloat16", 40, 72, mask="causal", lse=True))
    problems.append(AttentionProblem("float16", 8, 256, lse=True))
    problems.append(AttentionProblem("float16", 32, 192, mask="causal", lse=True))
    return list(dict.fromkeys(problems))


def decode_variants() -> list[AttentionProblem]:
    """variants() of the decode kernel, whole and split: launched with partials, they have no place in variants()."""
    paged = {"page_size": 16, "seqused_k": True}
    shapes = [("bfloat16", d, dv, {**paged, "mask": "causal", "lse": True}) for d, dv in HEAD_DIMS]
    plain = [
        {},
        {"packed_q": True, "packed_k": True, "mask": "causal"},
        {"seqused_k": True, "mask": "local", "softcap": True},
        {"packed_q": True, "seqused_q": True, **paged, "mask": "local", "lse": True},
        {**paged, "page_size": 8, "sink": "float32", "mask": "causal"},
        {**paged, "page_size": 784, "sink": "bfloat16", "alibi": True, "lse": True},
        {**paged, "mask": "causal", "chunked": True},
        {**paged, "mask": "causal", "context_parallel": True, "lse": True},
    ]
    shapes += [("float16", 128, 128, options) for options in plain]
    scales = {"k_descale": True, "v_descale": True}
    for kv_dtype in FP8_DTYPES:
        options = {**paged, **scales, "kv_dtype": kv_dtype, "mask": "causal", "lse": True}
        shapes += [(dtype, d, d, options) for dtype in DTYPES for d in (64, 128, 256)]
    shapes.append(("bfloat16", 192, 128, {**paged, "kv_dtype": FP8_DTYPES[0], "mask": "local", "softcap": True}))
    problems = [
        AttentionProblem(dtype, d, dv, decode=True, split=split, **options)
        for dtype, d, dv, options in shapes
        for split in (False, True)
    ]
    return list(dict.fromkeys(problems))
