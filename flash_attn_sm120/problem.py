"""AttentionProblem, CombineProblem, ClassifyProblem: all that selects machine code, and no more. The compile keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

MAX_HEAD_DIM = 256
DTYPES = ("bfloat16", "float16")
FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
MASKS = ("full", "causal", "local")
SPARSE_UNITS = (64, 32)  # rows and columns of a sparse block are multiples of them
# Of the tensors that a mod reads; scalars are int32 or float32.
AUX_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32")
AUX_SCALARS = ("int32", "float32")
ELEMENT_BYTES = 2  # of q, out and all that the matrix instructions read


def padded(head_dim: int) -> int:
    """Columns as the matrix instructions see them: head_dim rounded up to their depth of 16."""
    return (head_dim + 15) // 16 * 16


@dataclass(frozen=True, slots=True)
class Mod:
    """A score_mod or mask_mod. digest: of its code and of what that refers to; two functions that share it compute the
    same. width: elements of the vectors that it takes."""

    digest: str
    width: int = 1
    function: Callable | None = field(default=None, compare=False, repr=False)

    @property
    def bias(self) -> Callable | None:
        """What a score_mod adds to every score, where it does nothing else and the function offers that: bias(unit,
        batch, head, q_idx, kv_idx, seqlen_info, aux), of scalars, returns at(row, column), which is `unit` times what
        the score at q_idx + row, kv_idx + column gets. A copy of it, as functools.wraps makes, doesn't count."""
        owner, bias = getattr(self.function, "bias", (None, None))
        return bias if owner is self.function else None


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """One attention forward, up to sizes that are only known at run time.

    Batch, sequence lengths, head counts, strides, scale, softcap value and window sizes are run-time
    arguments of the compiled kernel and stand here only where their presence changes the code.

    dtype: "bfloat16" or "float16", of q, k, v and out.
    head_dim, head_dim_v: columns of q/k and of v/out; multiples of 8 up to 256.
    mask: "full"; "causal" (bottom-right aligned); "local" (window_left and window_right at run time,
        a causal call with a left window is local with window_right = 0).
    softcap: scores go through softcap * tanh(score / softcap).
    lse: the log-sum-exp is written.
    packed_q, packed_k: (total, heads, head_dim) with cu_seqlens, else (batch, seqlen, heads, head_dim).
    seqused_q, seqused_k: lengths a sequence, int32 (batch,), bound the rows that are used.
    tma_strides: q, k and v have strides that a tensor map can hold; False sends a dense problem to the plain kernel.
    kv_dtype: of k and v, "" for that of q; "float8_e4m3fn" or "float8_e5m2".
    page_size: rows of a page where k and v are pools (num_pages, page_size, heads_kv, head_dim) with a page table, a
        multiple of 8; 0 where they aren't.
    k_descale, v_descale: factors a batch entry and KV head that scores and out are multiplied by.
    sink: dtype of learnable_sink, "bfloat16" or "float32"; "" without.
    alibi: slopes a batch entry and head, score -= slope * |row + seqlen_k - seqlen_q - column|.
    chunked: attention_chunk at run time: a row sees only the columns of its own chunk of positions.
    context_parallel: k and v hold every cp_world_size-th token, from cp_rank on, of cp_tot_seqused_k.
    decode: few rows a sequence; the query heads of one KV head are rows of one tile.
    split: blocks of the decode kernel take a part of the keys each, and their float32 results are combined.
    dropout: weights are dropped at random.
    score_mod, mask_mod: functions of the caller that change scores, and that say which stay.
    aux: (dtype, rank) of each tensor that they read, then "int32" or "float32" for each number.
    sparse_block: (rows, columns) of a block of the lists that say which are computed; () without lists.
    dual_group: two query groups, each with a range of its own of the same packed keys; seqused_k says that ranges come
        a sequence. padded_lse: lse is (batch * heads, rounded seqlen_q), else (heads, total_q).
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    mask: str = "full"
    softcap: bool = False
    lse: bool = False
    packed_q: bool = False
    packed_k: bool = False
    seqused_q: bool = False
    seqused_k: bool = False
    tma_strides: bool = True
    kv_dtype: str = ""
    page_size: int = 0
    k_descale: bool = False
    v_descale: bool = False
    sink: str = ""
    alibi: bool = False
    chunked: bool = False
    context_parallel: bool = False
    decode: bool = False
    split: bool = False
    dropout: bool = False
    score_mod: Mod | None = None
    mask_mod: Mod | None = None
    aux: tuple[tuple[str, int] | str, ...] = ()
    sparse_block: tuple[int, ...] = ()
    dual_group: bool = False
    padded_lse: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {DTYPES}, got {self.dtype!r}")
        if self.kv_dtype not in ("", *FP8_DTYPES):
            raise ValueError(f"kv_dtype: expected '' or one of {FP8_DTYPES}, got {self.kv_dtype!r}")
        if self.sink not in ("", "bfloat16", "float32"):
            raise ValueError(f"sink: expected '', 'bfloat16' or 'float32', got {self.sink!r}")
        if self.page_size % 8 or self.page_size < 0:
            raise ValueError(f"page_size: expected a multiple of 8, got {self.page_size}")
        if self.mask not in MASKS:
            raise ValueError(f"mask: expected one of {MASKS}, got {self.mask!r}")
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            if value % 8 or not 8 <= value <= MAX_HEAD_DIM:
                raise ValueError(f"{name}: expected a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {value}")
        if any(size % unit or size <= 0 for size, unit in zip(self.sparse_block, SPARSE_UNITS, strict=False)):
            raise ValueError(f"sparse_block: expected multiples of {SPARSE_UNITS}, got {self.sparse_block}")
        if self.split and not self.decode:
            raise ValueError("split: expected False where decode is, got True")

    @property
    def paged(self) -> bool:
        """k and v are pools with a page table."""
        return self.page_size > 0

    @property
    def block_sparse(self) -> bool:
        """Lists say which blocks are computed."""
        return bool(self.sparse_block)

    @property
    def modded(self) -> bool:
        """A function of the caller is part of the kernel."""
        return self.score_mod is not None or self.mask_mod is not None

    @property
    def biased(self) -> bool:
        """score_mod is done before the products: their sums start with its bias. The scale of scores isn't 0."""
        scaled = self.kv_dtype or self.k_descale
        return self.score_mod is not None and self.score_mod.bias is not None and not scaled

    @property
    def rescored(self) -> bool:
        """score_mod is done on scores."""
        return self.score_mod is not None and not self.biased

    @property
    def varlen(self) -> bool:
        """Lengths differ between the sequences of a batch."""
        return self.packed_q or self.packed_k or self.seqused_q or self.seqused_k


@dataclass(frozen=True, slots=True)
class CombineProblem:
    """One combine of partial results, up to sizes that are only known at run time, the number of parts among them.

    dtype: of out, "bfloat16", "float16" or "float32"; the parts are float32.
    head_dim_v: columns of out, a multiple of 8 up to 256.
    lse: the log-sum-exp is written.
    packed: (total_q, heads, head_dim_v) with cu_seqlens, or as one sequence without; else (batch, seqlen_q, ...).
    cu_seqlens: only rows that a sequence names are written. seqused: rows beyond it become 0, their lse -inf.
    sink: dtype of learnable_sink, "bfloat16" or "float32"; "" without.
    """

    dtype: str
    head_dim_v: int
    lse: bool = False
    packed: bool = False
    cu_seqlens: bool = False
    seqused: bool = False
    sink: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in (*DTYPES, "float32"):
            raise ValueError(f"dtype: expected one of {(*DTYPES, 'float32')}, got {self.dtype!r}")
        if self.head_dim_v % 8 or not 8 <= self.head_dim_v <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim_v: expected a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {self.head_dim_v}")
        if self.sink not in ("", "bfloat16", "float32"):
            raise ValueError(f"sink: expected '', 'bfloat16' or 'float32', got {self.sink!r}")


@dataclass(frozen=True, slots=True)
class ClassifyProblem:
    """One sorting of a mask's blocks into full and partly visible ones, up to sizes that are only known at run time.

    mask_mod: which row sees which column.
    block_size: rows and columns of a block.
    aux: what the mask_mod reads: (dtype, rank) of each tensor, then "int32" or "float32" of each scalar.
    packed_q, packed_k: lengths and places of sequences come from cu_seqlens. seqused_q, seqused_k: from seqused.
    """

    mask_mod: Mod
    block_size: tuple[int, int] = (128, 128)
    aux: tuple[tuple[str, int] | str, ...] = ()
    packed_q: bool = False
    packed_k: bool = False
    seqused_q: bool = False
    seqused_k: bool = False

    def __post_init__(self) -> None:
        rows, cols = self.block_size
        if rows <= 0 or rows % 64 or cols <= 0 or cols % 32:
            expected = "rows a multiple of 64 and columns a multiple of 32, both > 0"
            raise ValueError(f"block_size: expected {expected}, got {self.block_size}")
        for entry in self.aux:
            if entry not in AUX_SCALARS if isinstance(entry, str) else entry[0] not in AUX_DTYPES:
                expected = f"(one of {AUX_DTYPES}, rank) or one of {AUX_SCALARS}"
                raise ValueError(f"aux: expected {expected}, got {entry!r}")
