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


class Total:
    """Attention over more and more keys. out: (rows, heads, d) float32, lse: (heads, rows)."""

    def __init__(self, part: torch.Tensor) -> None:
        self.out = torch.empty_like(part, dtype=torch.float32)
        self.lse = part.new_empty(part.shape[1], part.shape[0], dtype=torch.float32)

    def add(self, part: torch.Tensor, lse: torch.Tensor, first: int = 0, *, anew: bool) -> None:
        """Of part's rows, which are those from `first` on. anew: what was there before counts for nothing."""
        rows = slice(first, first + part.shape[0])
        if anew:
            self.out[rows].copy_(part)
            self.lse[:, rows].copy_(lse)
        else:
            merge(self.out[rows], self.lse[:, rows], part, lse)

    def write(self, out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor | None) -> None:
        """To out, of any dtype, and lse. sink: (heads,), one more logit of each row of a head, without a value."""
        if sink is not None:
            total = torch.logaddexp(self.lse, sink.float()[:, None])
            self.out *= torch.exp(self.lse - total).nan_to_num_(nan=0.0).T[..., None]
            self.lse.copy_(total)
        out.copy_(self.out)
        lse.copy_(self.lse)
