"""The two tile products of attention, S = Q K^T and O += P V, as ldmatrix and mma.sync m16n8k16."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from cutlass import Float32, cute

from flash_attn_sm120.device.ptx import mma_m16n8k16
from flash_attn_sm120.device.tile import SharedMatrix


def qk_product(
    tSrQ: cute.Tensor | None,
    sQ: SharedMatrix,
    sK: SharedMatrix,
    tSrS: cute.Tensor,
    dtype: str,
    bias: Callable | None = None,
) -> None:
    """tSrS = Q K^T of one warp, accumulators (m_frags, tile_n / 8, 4); sQ starts at the warp's first row. tSrQ
    (m_frags, columns / 16, 4): Q's first columns, where registers hold them. bias: (row, column) of the thread's part
    -> what is added, which sums start with."""
    m_frags, n_frags, _ = tSrS.shape
    acc = [[[Float32(0.0)] * 4 for _ in range(n_frags)] for _ in range(m_frags)]
    if bias is not None:
        for m, n in itertools.product(range(m_frags), range(n_frags)):
            acc[m][n] = [bias(16 * m + 8 * (i // 2), 8 * n + i % 2) for i in range(4)]
    for col in range(0, sK.layout.cols, 16):
        if tSrQ is not None and col // 16 < tSrQ.shape[1]:
            a = [[tSrQ[m, col // 16, i] for i in range(4)] for m in range(m_frags)]
        else:
            a = [sQ.load(16 * m, col) for m in range(m_frags)]
        for n in range(0, n_frags, 2):
            tSrK = sK.load(8 * n, col)
            for half in range(2):
                for m in range(m_frags):
                    acc[m][n + half] = mma_m16n8k16(a[m], tSrK[2 * half : 2 * half + 2], acc[m][n + half], dtype)
    for m in range(m_frags):
        for n in range(n_frags):
            for i in range(4):
                tSrS[m, n, i] = acc[m][n][i]


def pv_product(sV: SharedMatrix, tOrP: Iterable[list], tOrO: cute.Tensor, dtype: str) -> None:
    """tOrO += P V. tOrP: of 16 keys after another, [m] -> A operand; tOrO accumulators (m_frags, head_dim_v / 8, 4)."""
    for k, rows in enumerate(tOrP):
        for col in range(0, sV.layout.cols, 16):
            tOrV = sV.load(16 * k, col, transpose=True)
            for half in range(2):
                n = col // 8 + half
                for m, pairs in enumerate(rows):
                    acc = [tOrO[m, n, i] for i in range(4)]
                    acc = mma_m16n8k16(pairs, tOrV[2 * half : 2 * half + 2], acc, dtype)
                    for i in range(4):
                        tOrO[m, n, i] = acc[i]
