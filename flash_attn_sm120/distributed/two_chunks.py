"""A rank's rows as two query groups, the early chunks and the late ones, and attention of both in one launch."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from flash_attn_sm120.distributed.layout import Zigzag
from flash_attn_sm120.dual_group import fused_zigzag_llama3_flash_attn_varlen_forward


class Places(NamedTuple):
    """Where a rank's rows are. Group order: all early chunks, then all late ones; of one sequence it is the
    rank's own.

    early_rows: how many rows early chunks have. to_groups: int64, the place in the rank's own order of each row in
    group order; to_own: the other way; None where the orders are one. marks: cu_seqlens of the early chunks, of the
    late ones and of both together, which the rank's keys have."""

    early_rows: int
    to_groups: torch.Tensor | None
    to_own: torch.Tensor | None
    marks: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def in_group_order(self, q: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head_dim)."""
        return q if self.to_groups is None else q.index_select(0, self.to_groups)

    def in_own_order(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """out (tokens, heads, head_dim_v) and lse (heads, tokens) of rows in group order."""
        if self.to_own is None:
            return out, lse
        return out.index_select(0, self.to_own), lse.index_select(1, self.to_own)


Limit = int | torch.Tensor  # of the first keys of a sequence, how many a group sees; int32 (batch,) for several


@lru_cache(maxsize=64)
def places(layout: Zigzag, rank: int, device: torch.device) -> Places:
    chunks = layout.chunks(rank)
    sizes = [[len(pair[group]) for pair in chunks] for group in range(2)]
    together = [early + late for early, late in zip(*sizes, strict=True)]
    marks = (_marks(sizes[0], device), _marks(sizes[1], device), _marks(together, device))
    early_rows = sum(sizes[0])
    if len(chunks) == 1:
        return Places(early_rows, None, None, marks)
    parts = torch.arange(sum(together)).split([size for pair in zip(*sizes, strict=True) for size in pair])
    to_groups = torch.cat([*parts[::2], *parts[1::2]])
    return Places(early_rows, to_groups.to(device), torch.argsort(to_groups).to(device), marks)


@lru_cache(maxsize=64)
def key_marks(layout: Zigzag, device: torch.device) -> torch.Tensor:
    """cu_seqlens of the whole sequences."""
    return _marks(layout.seqlens, device)


@lru_cache(maxsize=256)
def limits(lengths: tuple[int, ...], device: torch.device) -> Limit:
    """As an int where there is one sequence: kernels with a length for each are others."""
    return lengths[0] if len(lengths) == 1 else torch.tensor(lengths, dtype=torch.int32, device=device)


def attend(
    groups: tuple[torch.Tensor, torch.Tensor],
    marks: tuple[torch.Tensor, torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    key_marks: torch.Tensor,
    reach: tuple[Limit, Limit],
    causal: bool,
    options: dict[str, Any],
    outs: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out0, out1, lse0, lse1) of both groups over the first keys of each sequence."""
    return fused_zigzag_llama3_flash_attn_varlen_forward(
        *groups, k, v, *marks, key_marks, None, None, None, *reach, causal=causal, out0=outs[0], out1=outs[1], **options
    )


def _marks(lengths: Any, device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
