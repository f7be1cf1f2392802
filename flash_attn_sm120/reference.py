"""Attention in plain PyTorch: the oracle that every kernel is held against, on any device.

In float32 it is the truth. In the inputs' dtype it is what a PyTorch user would get by writing the formula down, and
its error is the yardstick for the kernels' error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

SCORES_AT_ONCE = 1 << 26  # scores held at a time, so that long sequences fit: 256 MB in float32


@dataclass(frozen=True)
class Options:
    """What the formula needs besides q, k and v; window sides as ints, None for unbounded."""

    softmax_scale: float
    window_left: int | None
    window_right: int | None
    softcap: float
    dtype: torch.dtype


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    dtype: torch.dtype | None = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) for the arguments of flash_attn_func and flash_attn_varlen_func, with their meaning.

    q (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with cu_seqlens_q; k and v likewise.
    dtype: of the products and the softmax; None: that of q. out has it too; lse is float32, (batch, heads, seqlen_q) or
        (heads, total_q).
    Rows that see nothing, rows beyond seqused_q and rows that no sequence names are 0, their lse -inf.
    """
    dtype = q.dtype if dtype is None else dtype
    left, right = (None if side in (None, -1) else side for side in window_size or (-1, -1))
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    options = Options(scale, left, 0 if causal else right, softcap or 0.0, dtype)
    heads = q.shape[-2]
    out = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype, device=q.device)
    lse_shape = (heads, q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], heads, q.shape[1])
    lse = torch.full(lse_shape, -math.inf, dtype=torch.float32, device=q.device)

    rows_q = _sequences(q, cu_seqlens_q, seqused_q)
    rows_k = _sequences(k, cu_seqlens_k, seqused_k)
    with _full_precision():
        for index_q, index_k in zip(rows_q, rows_k, strict=True):
            q_b, k_b, v_b = q[index_q], k[index_k], v[index_k]
            if q_b.shape[0] == 0 or k_b.shape[0] == 0:
                continue
            lse_b = lse[:, index_q] if cu_seqlens_q is not None else lse[index_q[0]][:, index_q[1]]
            _one_sequence(q_b, k_b, v_b, out[index_q], lse_b, options)
    return out, lse


def _sequences(tensor: torch.Tensor, cu_seqlens: torch.Tensor | None, seqused: torch.Tensor | None) -> list:
    """For each sequence, the index of its used rows in the tensor."""
    if cu_seqlens is None:
        starts, rooms = [0] * tensor.shape[0], [tensor.shape[1]] * tensor.shape[0]
    else:
        marks = cu_seqlens.tolist()
        starts, rooms = marks[:-1], [end - start for start, end in itertools.pairwise(marks)]
    lengths = rooms if seqused is None else seqused.tolist()
    rows = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return rows if cu_seqlens is not None else [(batch, row) for batch, row in enumerate(rows)]


def _one_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, options: Options
) -> None:
    """q (seqlen_q, heads, d), k, v (seqlen_k, heads_kv, d or d_v); fills out (seqlen_q, heads, d_v) and its lse."""
    seqlen_q, heads = q.shape[:2]
    seqlen_k, heads_kv = k.shape[:2]
    ratio = heads // heads_kv
    kv_heads_at_once = max(1, SCORES_AT_ONCE // (ratio * seqlen_q * seqlen_k))
    rows_at_once = max(1, SCORES_AT_ONCE // (ratio * seqlen_k))
    for first in range(0, heads_kv, kv_heads_at_once):
        last = min(first + kv_heads_at_once, heads_kv)
        own = slice(first * ratio, last * ratio)
        keys = k[:, first:last].to(options.dtype).permute(1, 2, 0).repeat_interleave(ratio, 0)
        values = v[:, first:last].to(options.dtype).transpose(0, 1).repeat_interleave(ratio, 0)
        for row in range(0, seqlen_q, rows_at_once):
            rows = slice(row, min(row + rows_at_once, seqlen_q))
            queries = q[rows, own].to(options.dtype).transpose(0, 1)
            visible = _visible(rows, seqlen_q, seqlen_k, options, q.device)
            o, log_sum = _rows(queries, keys, values, visible, options)
            out[rows, own] = o.transpose(0, 1)
            lse[own, rows] = log_sum


def _visible(rows: slice, seqlen_q: int, seqlen_k: int, options: Options, device: torch.device) -> torch.Tensor | None:
    """(rows, seqlen_k) bool, or None where all is visible; the last row is aligned with the last column."""
    if options.window_left is None and options.window_right is None:
        return None
    diagonal = torch.arange(rows.start, rows.stop, device=device)[:, None] + (seqlen_k - seqlen_q)
    column = torch.arange(seqlen_k, device=device)[None, :]
    visible = torch.ones(rows.stop - rows.start, seqlen_k, dtype=torch.bool, device=device)
    if options.window_left is not None:
        visible &= column >= diagonal - options.window_left
    if options.window_right is not None:
        visible &= column <= diagonal + options.window_right
    return visible


def _rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (heads, rows, d), k (heads, d, seqlen_k), v (heads, seqlen_k, d_v) -> out (heads, rows, d_v) and its lse."""
    scores = q @ k
    scores *= options.softmax_scale
    if options.softcap:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if visible is not None:
        scores.masked_fill_(~visible, -math.inf)
    lse = torch.logsumexp(scores.float(), dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if visible is not None:
        # A row without a column is 0 / 0 to softmax, and 0 to us.
        weights.masked_fill_(~visible.any(-1, keepdim=True), 0.0)
    return weights @ v, lse


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32, whatever the process has chosen."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
