"""Attention over more keys out of attention over some and over others, in place."""

from __future__ import annotations

import torch

ROWS_AT_ONCE = 4096  # so that what is in float32 for a moment is small


def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """out (rows, heads, d) float32 and lse (heads, rows) become those over both sets of keys.

    other: (rows, heads, d) of any dtype. A row without keys has lse -inf and counts for nothing; its out is finite.
    Source: Milakov and Gimelshein, online softmax (2018)."""
    total = torch.logaddexp(lse, other_lse)
    weight = torch.exp(other_lse - total).nan_to_num_(nan=0.0)  # -inf minus -inf: no keys in either
    lse.copy_(total)
    for first in range(0, out.shape[0], ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        out[some].lerp_(other[some].float(), weight[:, some].T[..., None])


def add_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> None:
    """Each row of a head gets one more logit, sink (heads,), that has no value."""
    total = torch.logaddexp(lse, sink.float()[:, None])
    out *= torch.exp(lse - total).nan_to_num_(nan=0.0).T[..., None]
    lse.copy_(total)
