"""AttentionProblem: everything that selects machine code, and nothing else. It is the compile key."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEAD_DIM = 256
DTYPES = ("bfloat16", "float16")
MASKS = ("full", "causal", "local")


def padded(head_dim: int) -> int:
    """Columns as the matrix instructions see them: head_dim rounded up to their depth of 16."""
    return (head_dim + 15) // 16 * 16


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
    page_table, block_sparse, dropout: keys through a page table, blocks left out by a list, weights dropped at random.
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
    page_table: bool = False
    block_sparse: bool = False
    dropout: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {DTYPES}, got {self.dtype!r}")
        if self.mask not in MASKS:
            raise ValueError(f"mask: expected one of {MASKS}, got {self.mask!r}")
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            if value % 8 or not 8 <= value <= MAX_HEAD_DIM:
                raise ValueError(f"{name}: expected a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {value}")

    @property
    def varlen(self) -> bool:
        """Lengths differ between the sequences of a batch."""
        return self.packed_q or self.packed_k or self.seqused_q or self.seqused_k
