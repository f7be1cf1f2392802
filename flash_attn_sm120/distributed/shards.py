"""shard and unshard: a rank's tokens out of whole sequences, and whole sequences out of all ranks' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from flash_attn_sm120.checks import describe, refuse
from flash_attn_sm120.distributed.checks import check_seqlens, check_whole
from flash_attn_sm120.distributed.layout import Zigzag


def shard(x: torch.Tensor, rank: int, world_size: int, dim: int = 1) -> torch.Tensor:
    """A rank's tokens of a batch of sequences of one length, as zigzag_attention and ring_attention take them.

    x: any shape and dtype, whole sequences along dim: q (batch, seqlen, heads, head_dim), lse (batch, heads, seqlen)
        with dim 2, labels (batch, seqlen).

    Returns a copy with the tokens of chunks rank and 2 * world_size - 1 - rank, of 2 * world_size, along dim. Where
    seqlen doesn't divide, the first chunks are a token longer; chunks may be empty.

    Raises ValueError or TypeError in the form `argument: expected ..., got ...`.
    """
    _check_ranks(x, dim, world_size, rank)
    return _take(x, Zigzag((x.shape[dim],), world_size), rank, dim)


def shard_varlen(x: torch.Tensor, seqlens: Sequence[int], rank: int, world_size: int, dim: int = 0) -> torch.Tensor:
    """shard for sequences that are packed along dim, of seqlens tokens each: chunks of each sequence, one sequence
    behind the other. Rows of x behind the last sequence are left out."""
    _check_ranks(x, dim, world_size, rank)
    layout = Zigzag(check_seqlens(seqlens), world_size)
    if layout.total > x.shape[dim]:
        refuse("seqlens", f"a sum of at most {x.shape[dim]}, the size of x along {dim}", layout.total)
    return _take(x, layout, rank, dim)


def unshard(parts: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """The whole sequences that shard(x, rank, len(parts), dim) gave parts[rank] of, for all ranks in order."""
    _check_parts(parts, dim)
    layout = Zigzag((sum(part.shape[dim] for part in parts),), len(parts))
    return _put_together(parts, layout, dim)


def unshard_varlen(parts: Sequence[torch.Tensor], seqlens: Sequence[int], dim: int = 0) -> torch.Tensor:
    """The same for shard_varlen."""
    _check_parts(parts, dim)
    return _put_together(parts, Zigzag(check_seqlens(seqlens), len(parts)), dim)


def positions(layout: Zigzag, rank: int) -> torch.Tensor:
    """int64: where a rank's tokens, in its own order, are in the packed whole sequences."""
    parts, start = [torch.empty(0, dtype=torch.int64)], 0
    for seqlen, chunks in zip(layout.seqlens, layout.chunks(rank), strict=True):
        parts += [torch.arange(start + chunk.start, start + chunk.stop) for chunk in chunks]
        start += seqlen
    return torch.cat(parts)


@lru_cache(maxsize=16)
def rows_of_ranks(layout: Zigzag, device: torch.device) -> torch.Tensor:
    """int64 (total,): where each token of the whole sequences is in all ranks' tokens, each rank's in its own order and
    with room for most_tokens."""
    rows = torch.empty(layout.total, dtype=torch.int64)
    for rank in range(layout.world_size):
        first = rank * layout.most_tokens
        rows[positions(layout, rank)] = torch.arange(first, first + layout.tokens(rank))
    return rows.to(device)


def _take(x: torch.Tensor, layout: Zigzag, rank: int, dim: int) -> torch.Tensor:
    return x.index_select(dim, positions(layout, rank).to(x.device))


def _put_together(parts: Sequence[torch.Tensor], layout: Zigzag, dim: int) -> torch.Tensor:
    for rank, part in enumerate(parts):
        if part.shape[dim] != layout.tokens(rank):
            refuse(f"parts[{rank}]", f"{layout.tokens(rank)} tokens along {dim}, rank {rank}'s", describe(part))
    shape = list(parts[0].shape)
    shape[dim] = layout.total
    whole = parts[0].new_empty(shape)
    for rank, part in enumerate(parts):
        whole.index_copy_(dim, positions(layout, rank).to(part.device), part)
    return whole


def _check_ranks(x: torch.Tensor, dim: int, world_size: int, rank: int) -> None:
    _check_dim("x", x, dim)
    check_whole("world_size", world_size, 1)
    check_whole("rank", rank, 0)
    if rank >= world_size:
        refuse("rank", f"from 0 to world_size - 1 = {world_size - 1}", rank)


def _check_parts(parts: Sequence[torch.Tensor], dim: int) -> None:
    if not isinstance(parts, (list, tuple)) or not parts:
        refuse("parts", "a list with a tensor of each rank", describe(parts), TypeError)
    for rank, part in enumerate(parts):
        _check_dim(f"parts[{rank}]", part, dim)
        first = parts[0]
        if part.dtype != first.dtype:
            refuse(
                f"parts[{rank}]", f"{str(first.dtype).removeprefix('torch.')} as parts[0]", describe(part), TypeError
            )
        others = [(tuple(one.shape[:dim]), tuple(one.shape[dim:][1:])) for one in (part, first)]
        if others[0] != others[1] or part.device != first.device:
            refuse(f"parts[{rank}]", f"a shape that differs from parts[0] along {dim} only", describe(part))


def _check_dim(name: str, x: torch.Tensor, dim: int) -> None:
    if not isinstance(x, torch.Tensor):
        refuse(name, "a torch.Tensor", describe(x), TypeError)
    check_whole("dim", dim, 0)
    if dim >= x.dim():
        refuse("dim", f"less than {x.dim()}, the dimensions of {name}", dim)
