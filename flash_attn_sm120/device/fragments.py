"""Register tensors that hold accumulators of mma.sync m16n8k16 across branches and loop iterations.

With group = lane // 4 and quad = lane % 4, value i of the 16 x 8 block (m, n) is row 16 m + 8 (i // 2) + group,
column 8 n + 2 quad + i % 2 (PTX ISA, mma.m16n8k16).
"""

from __future__ import annotations

from collections.abc import Iterator

from cutlass import Float32, cute


def accumulators(m_frags: int, n_frags: int) -> cute.Tensor:
    """(m_frags, n_frags, 4) float32; a block's four values lie side by side as in mma.sync, which saves moves."""
    layout = cute.make_layout((m_frags, n_frags, 4), stride=(4 * n_frags, 4, 1))
    return cute.make_rmem_tensor(layout, Float32)


def elements(tensor: cute.Tensor) -> Iterator[tuple[int, int, int]]:
    """Every (m, n, i)."""
    m_frags, n_frags, values = tensor.shape
    return ((m, n, i) for m in range(m_frags) for n in range(n_frags) for i in range(values))
