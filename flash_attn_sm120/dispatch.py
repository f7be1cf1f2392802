"""choose(problem) -> Plan: which kernel and which tile, from SM120's limits and a table of what measured best.

Pure Python, imports neither torch nor cutlass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flash_attn_sm120.decode_plan import decode_memory, decode_row
from flash_attn_sm120.problem import ELEMENT_BYTES, MASKS, AttentionProblem, CombineProblem, padded

FP8_COPYING_WARPS = 4  # which convert
# How a prefill kernel's tiles come into shared memory; strips: by cp.async, Q by the warps that have its rows. One more
# is fp8_boxes, which one tile has code for.
WAYS = ("cp_async", "pages", "page_boxes", "fp8", "tma", "strips")
# Attributes of a problem that take registers from the main loop.
CHANGES = ("dropout", "score_mod", "mask_mod", "block_sparse")
MODIFIERS = (
    *("softcap", "sink", "alibi", "chunked", "context_parallel", "k_descale", "v_descale"),
    *("dropout", "rescored", "biased", "mask_mod", "block_sparse"),
)
MAX_SPLITS = 64  # parts of a sequence in a decode
TILE_NOTE_BYTES = 48  # what a thread block writes down instead of keeping it in registers, behind the tiles
SECOND_NOTE_BYTES = 48
LISTED_BYTES = 16  # numbers of the next listed blocks, behind the notes
FACTOR_BYTES = 16  # behind all else, in whole 16 bytes
TURN_BYTES = 16  # behind the notes of a block that takes one tile after another
STRIP_NOTE_BYTES = 64  # of a warp, where two query groups are
WAY_NOTE_BYTES = 32  # the blocks that the warps of two query groups go over together


def barrier_bytes(stages: int) -> int:
    """Of the mbarriers behind the note: one of Q's, four of each stage, one of the tile's end."""
    return 16 + 32 * stages


@dataclass(frozen=True, slots=True)
class Plan:
    """How a problem is computed: the kernel and its tile.

    num_warps: those that multiply; loading_warps: those that only load. loading_registers, matrix_registers: what a
    thread of each has once they have changed hands, 0 where the chip can't. blocks_per_sm: thread blocks that an SM of
    SM120 is to hold at a time, within the limits of occupancy.py. stages: tiles of K and of V that a block
    has room for, or granules of keys that a decode's warp has in flight. smem_bytes: dynamic shared memory of a block.
    """

    kernel: str
    tile_m: int
    tile_n: int
    num_warps: int
    blocks_per_sm: int
    smem_bytes: int
    q_in_registers: bool = False
    loading_warps: int = 4  # registers change hands between groups of four
    copying_warps: int = 1  # of the loading ones, see warps_that_copy; the others only give their registers
    loading_registers: int = 0
    matrix_registers: int = 0
    stages: int = 1
    way: str = ""  # of loading, in prefill
    note_bytes: int = TILE_NOTE_BYTES
    turn_bytes: int = 0  # of the word that says which of its tiles a block is at
    loader_barriers: int = 0  # mbarriers of the loading warps' own
    factor_bytes: int = 0  # of what out is multiplied by, where no register holds what that is found with

    @property
    def persistent(self) -> bool:
        """Whether a thread block takes one tile after another. All of a problem's candidates agree."""
        return self.turn_bytes > 0

    @property
    def hands_over_registers(self) -> bool:
        return self.matrix_registers > 0

    @property
    def note_offset(self) -> int:
        """Where in shared memory the tile's note lies."""
        return self.turn_offset - self.note_bytes

    @property
    def turn_offset(self) -> int:
        """Where the turn lies."""
        return self.barrier_offset - self.turn_bytes

    @property
    def barrier_offset(self) -> int:
        """Where the mbarriers lie."""
        return self.loader_barrier_offset - barrier_bytes(self.stages)

    @property
    def loader_barrier_offset(self) -> int:
        """Where those of the loading warps' own lie."""
        return self.factor_offset - 8 * self.loader_barriers

    @property
    def factor_offset(self) -> int:
        """Where the factor lies."""
        return self.smem_bytes - self.factor_bytes


@dataclass(frozen=True, slots=True)
class TileRow:
    """A row of a tile table: serves head dims up to (head_dim, head_dim_v) with one of `masks` and one of the `ways` of
    loading, and those of MODIFIERS that `modifiers` names. persistent: a thread block takes one tile after another."""

    head_dim: int
    head_dim_v: int
    tile_m: int
    tile_n: int
    num_warps: int
    blocks_per_sm: int
    stages: int = 1
    q_in_registers: bool = False
    copying_warps: int = 1
    masks: tuple[str, ...] = MASKS
    ways: tuple[str, ...] = WAYS
    persistent: bool = False
    modifiers: tuple[str, ...] = MODIFIERS

    def serves(self, problem: AttentionProblem, way: str) -> bool:
        fits = problem.head_dim <= self.head_dim and problem.head_dim_v <= self.head_dim_v
        modified = all(name in self.modifiers for name in MODIFIERS if getattr(problem, name))
        blocks = zip(problem.sparse_block, (self.tile_m, self.tile_n), strict=False)
        whole = not any(size % tile for size, tile in blocks)
        return fits and whole and problem.mask in self.masks and way in self.ways and modified


# 32 rows a warp where registers and shared memory allow it (half the shared-memory reads), 16 above head_dim 128, where
# Q in registers saves a third of them. Evidence: benchmarks/NOTES.md, "One main loop".
COMMON_TILES = (
    TileRow(64, 64, tile_m=128, tile_n=64, num_warps=4, blocks_per_sm=2),
    TileRow(96, 96, tile_m=128, tile_n=64, num_warps=4, blocks_per_sm=2),
    TileRow(128, 128, tile_m=128, tile_n=32, num_warps=4, blocks_per_sm=2),
    TileRow(192, 192, tile_m=128, tile_n=64, num_warps=8, blocks_per_sm=1, q_in_registers=True),
    TileRow(256, 256, tile_m=128, tile_n=32, num_warps=8, blocks_per_sm=1, q_in_registers=True),
)
# The largest tile that fits its registers is the fastest. 256x64 doesn't with modifiers but dropout, lists of blocks
# that TMA brings and biases of dense scores, nor where four warps copy and window bounds are held, nor with pages that
# come by cp.async. Converting 8-bit keys in registers costs the same for 128 rows as for 256, and takes registers.
# Evidence: benchmarks/NOTES.md, "The largest tile under every mask", "Pages at dense speed", "Dropout, mods, lists".
LARGEST = TileRow(128, 128, tile_m=256, tile_n=64, num_warps=8, blocks_per_sm=1, modifiers=())
FP8_TILES = tuple(
    TileRow(d, d, tile_m, tile_n, num_warps=8, blocks_per_sm=1, stages=stages, q_in_registers=d > 128, ways=("fp8",))
    for d, tile_m, tile_n, stages in ((128, 256, 32, 2), (192, 128, 32, 2), (256, 128, 16, 1))
)
# For sparse blocks of fewer rows, and functions of the caller that take many registers.
NARROW_TILES = tuple(
    TileRow(d, d, tile_m=64, tile_n=tile_n, num_warps=4, blocks_per_sm=2, ways=("cp_async", "pages", "tma"))
    for d, tile_n in ((192, 32), (256, 16))
)
FORWARD_TILES = (
    *COMMON_TILES[:2],
    replace(LARGEST, ways=("cp_async",), copying_warps=4, masks=("full", "causal"), modifiers=("dropout",)),
    replace(LARGEST, ways=("page_boxes",), copying_warps=4, modifiers=("dropout",)),
    replace(LARGEST, ways=("fp8_boxes",), modifiers=("k_descale", "v_descale")),
    replace(LARGEST, ways=("tma",), modifiers=("block_sparse",)),
    replace(LARGEST, ways=("tma",), modifiers=("dropout",)),
    *(row for rows in zip(FP8_TILES, COMMON_TILES[2:], strict=True) for row in rows),
    *NARROW_TILES,
)
# The end of a tile and the start of the next cost 5 us one behind the other, so thread blocks stay, but where the loop
# that they then have costs more: head_dim 64 and 128 without a mask. There 96 keys a block are the fastest at head_dim
# 64. Evidence: benchmarks/NOTES.md, "One tile after another", "Keys of a block at head_dim 64".
SMALLEST, SMALL, MIDDLE, *LARGE = COMMON_TILES
FORWARD_TMA_TILES = (
    replace(SMALLEST, persistent=True, masks=("causal", "local")),
    replace(SMALLEST, tile_n=96),
    SMALLEST,
    replace(SMALL, persistent=True),
    replace(LARGEST, persistent=True, masks=("causal",)),
    replace(LARGEST, modifiers=("biased",)),
    MIDDLE,
    *(replace(row, persistent=True) for row in (*LARGE, NARROW_TILES[-1])),
    NARROW_TILES[-1],
)
DUAL_GROUP_TILES = (
    *COMMON_TILES[:2],
    replace(LARGEST, ways=("strips",), copying_warps=4, masks=("full", "causal")),
    *COMMON_TILES[2:],
)
TILES = {"forward": FORWARD_TILES, "forward_tma": FORWARD_TMA_TILES, "dual_group": DUAL_GROUP_TILES}
# A thread's registers once they have changed hands, loading and matrix, by way of loading, matrix warps and tile_n:
# together what the equal shares of the launch had.
REGISTERS = {
    ("cp_async", 4, 32): (32, 224),
    ("cp_async", 4, 64): (32, 224),
    ("cp_async", 8, 32): (24, 240),
    ("cp_async", 8, 64): (24, 240),
    ("cp_async", 4, 16): (32, 224),
    ("pages", 4, 16): (32, 224),
    ("tma", 4, 16): (24, 232),
    ("pages", 4, 32): (32, 224),
    ("pages", 4, 64): (32, 224),
    ("pages", 8, 32): (40, 232),
    ("pages", 8, 64): (40, 232),
    ("page_boxes", 4, 32): (24, 232),
    ("page_boxes", 4, 64): (24, 232),
    ("page_boxes", 8, 32): (24, 240),
    ("page_boxes", 8, 64): (24, 240),
    ("fp8", 4, 32): (40, 216),
    ("fp8", 4, 64): (40, 216),
    ("fp8", 8, 16): (40, 232),
    ("fp8", 8, 32): (40, 232),
    ("fp8_boxes", 8, 64): (24, 240),
    ("strips", 4, 32): (32, 224),
    ("strips", 4, 64): (32, 224),
    ("strips", 8, 32): (40, 232),
    ("strips", 8, 64): (24, 240),
    ("tma", 4, 32): (24, 232),
    ("tma", 4, 64): (24, 232),
    ("tma", 4, 96): (24, 232),
    ("tma", 8, 32): (24, 240),
    ("tma", 8, 64): (24, 240),
}


def loading_way(kernel: str, problem: AttentionProblem, arch: str) -> str:
    """One of WAYS. A tensor map holds a pool as it holds a dense tensor."""
    if kernel == "forward_tma":
        return "tma"
    if kernel == "dual_group":
        return "strips"
    boxes = fits_tensor_maps(problem, arch)
    if problem.kv_dtype:
        return "fp8_boxes" if boxes and fits_bytes(problem) else "fp8"
    if problem.paged:
        return "page_boxes" if boxes and not problem.block_sparse else "pages"
    # what TMA brings behind a sequence's end is zeros only where that is the tensor's
    dense = not any(getattr(problem, name) for name in ("varlen", *SERVING))
    return "tma" if boxes and dense and any(getattr(problem, name) for name in SPARSE) else "cp_async"


def fits_bytes(problem: AttentionProblem) -> bool:
    """Whether 8-bit rows of a pool fill a chunk of a tile each, and the kernel that takes them as bytes has a tile.
    bfloat16 Q gets k_descale when it becomes f16; float16 Q, which isn't changed, leaves no register for it."""
    free = ("k_descale", "v_descale") if problem.dtype == "bfloat16" else ("v_descale",)
    modified = any(getattr(problem, name) for name in MODIFIERS if name not in free)
    return problem.paged and problem.head_dim == problem.head_dim_v == 128 and not modified


def fits_tensor_maps(problem: AttentionProblem, arch: str) -> bool:
    """Whether TMA can load q, or a pool, k and v."""
    whole_boxes = problem.head_dim % 32 == 0 and problem.head_dim_v % 32 == 0
    return compute_capability(arch) >= 9 and problem.tma_strides and whole_boxes


def smem_bytes(problem: AttentionProblem, row: TileRow) -> int:
    """Q, the stages of K and V, a note and the barriers; out takes the tiles' place at the end, but where one Q tile
    follows another."""
    d, dv = padded(problem.head_dim), padded(problem.head_dim_v)
    inputs = row.tile_m * d + row.stages * row.tile_n * (d + dv)
    notes = note_bytes(problem, row.num_warps)
    return ELEMENT_BYTES * max(inputs, row.tile_m * dv) + notes + barrier_bytes(row.stages)


def note_bytes(problem: AttentionProblem, num_warps: int) -> int:
    """Of the tile's note, with the part that lists and mods need; of two groups, one a warp and one for all."""
    if problem.dual_group:
        return num_warps * STRIP_NOTE_BYTES + WAY_NOTE_BYTES
    changed = any(getattr(problem, name) for name in CHANGES)
    return TILE_NOTE_BYTES + SECOND_NOTE_BYTES * changed + LISTED_BYTES * problem.block_sparse


# Attributes of a problem that a kernel has no code for.
SPARSE = ("block_sparse", "dropout")  # which the dispatcher keeps off the TMA kernel
SERVING = ("paged", "kv_dtype", "k_descale", "v_descale", "sink", "alibi", "chunked", "context_parallel")
EXCLUDED = {
    "forward": ("decode", "split", "dual_group"),
    "forward_tma": ("varlen", *SERVING, *SPARSE, "decode", "split", "dual_group"),
    "decode": (*CHANGES, "dual_group"),
    "dual_group": (*(name for name in SERVING if name != "sink"), *CHANGES, "seqused_q", "decode", "split"),
}
MAX_PARTS = 128  # that a combination takes
DECODE_ROWS = 16  # query tokens of a sequence up to which the decode kernel is faster


def use_decode(max_seqlen_q: int | None, num_splits: int) -> bool:
    """Whether a call is the decode kernel's: few rows a sequence, or splits asked for.

    max_seqlen_q: None where a packed call doesn't say it. num_splits: 0 to choose."""
    return num_splits > 1 or (max_seqlen_q is not None and max_seqlen_q <= DECODE_ROWS)


def can_implement(kernel: str, problem: AttentionProblem, arch: str) -> bool:
    """Whether the kernel gives right results for the problem on a target such as "sm_120a"."""
    if any(getattr(problem, name) for name in EXCLUDED[kernel]):
        return False
    if kernel == "dual_group":
        return problem.dual_group
    if kernel != "forward_tma":
        return problem.decode == (kernel == "decode")
    return fits_tensor_maps(problem, arch)


def compute_capability(arch: str) -> int:
    """Of a target such as "sm_120a": its major number."""
    return int("".join(filter(str.isdigit, arch))) // 10


def plan_for(kernel: str, problem: AttentionProblem, arch: str = "sm_120a") -> Plan:
    """The kernel's plan, whether or not the dispatcher would take it."""
    return plans_for(kernel, problem, arch)[0]


def plans_for(kernel: str, problem: AttentionProblem, arch: str = "sm_120a") -> list[Plan]:
    """The kernel's plans for a problem, the fastest first, each with fewer scores in a thread than those before."""
    if kernel == "decode":
        own = decode_row(problem)
        size = decode_memory(problem, own.tile_m, own.tile_n, own.num_warps, own.stages).bytes
        tile = (own.tile_m, own.tile_n, own.num_warps, own.blocks_per_sm)
        return [Plan(kernel, *tile, size, loading_warps=0, stages=own.stages)]
    way = loading_way(kernel, problem, arch)
    rows = TILES[kernel] if hands_over_registers(arch) else (*COMMON_TILES, *NARROW_TILES)
    plans: list[Plan] = []
    least = None
    for row in rows:
        scores = row.tile_m * row.tile_n // row.num_warps
        if not row.serves(problem, way) or (plans and row.persistent != plans[0].persistent):
            continue  # one problem's plans take the same arguments
        if least is None or scores < least:
            plans.append(_plan_of(row, kernel, problem, way, arch))
            least = scores
    return plans


def hands_over_registers(arch: str) -> bool:
    """Else one block has all of them."""
    return compute_capability(arch) >= 9


def _plan_of(row: TileRow, kernel: str, problem: AttentionProblem, way: str, arch: str) -> Plan:
    tile = (row.tile_m, row.tile_n, row.num_warps, row.blocks_per_sm)
    turn_bytes = TURN_BYTES if row.persistent else 0
    loader_barriers = FP8_COPYING_WARPS if way == "fp8_boxes" else 0
    factor_bytes = FACTOR_BYTES if way == "fp8_boxes" and problem.v_descale else 0
    smem = smem_bytes(problem, row) + turn_bytes + 8 * loader_barriers + factor_bytes
    plan = Plan(kernel, *tile, smem, row.q_in_registers, stages=row.stages, way=way, turn_bytes=turn_bytes)
    plan = replace(plan, loader_barriers=loader_barriers, factor_bytes=factor_bytes)
    copying_warps = FP8_COPYING_WARPS if way in ("fp8", "fp8_boxes") else row.copying_warps
    plan = replace(plan, copying_warps=copying_warps, note_bytes=note_bytes(problem, row.num_warps))
    if not hands_over_registers(arch):
        return replace(plan, blocks_per_sm=1)
    loading, matrix = REGISTERS[way, row.num_warps, row.tile_n]
    return replace(plan, loading_registers=loading, matrix_registers=matrix)


def choose(problem: AttentionProblem | CombineProblem, arch: str = "sm_120a") -> Plan | None:
    """The plan for a problem: TMA where it may be used, as it measured faster for every head_dim; tiles are SM120's
    whatever the target. None for a combination, which has one way. Raises NotImplementedError for what no kernel does.
    """
    if isinstance(problem, CombineProblem):
        return None
    return candidates(problem, arch)[0]


def candidates(problem: AttentionProblem, arch: str = "sm_120a") -> list[Plan]:
    """The chosen kernel's plans, the fastest first: what registers a function of the caller takes is known once it is
    compiled, and the first plan that it leaves without a stack is to be taken."""
    kernels = ("forward_tma", "forward", "decode", "dual_group")
    kernel = next(name for name in kernels if can_implement(name, problem, arch))
    plans = plans_for(kernel, problem, arch)
    changed = any(getattr(problem, name) for name in CHANGES)
    return plans if changed else plans[:1]
