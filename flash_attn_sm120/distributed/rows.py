"""K and V of a token beside each other in one row, so that one copy or message brings both."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flash_attn_sm120.distributed.streams import Side


class Piece(NamedTuple):
    """Rows of some heads, and when they are written."""

    rows: torch.Tensor
    written: torch.cuda.Event | None


def room(x: torch.Tensor, v: torch.Tensor, rows: int, heads: int) -> torch.Tensor:
    """For as many rows of so many heads of x (K) and v."""
    return x.new_empty(rows, heads * (x.shape[-1] + v.shape[-1]))


def write(rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """k (tokens, heads, head_dim) and v (tokens, heads, head_dim_v) into the first rows."""
    own_k, own_v = split(rows[: k.shape[0]], k.shape[1], k.shape[2], v.shape[2])
    own_k.copy_(k)
    own_v.copy_(v)


def split(rows: torch.Tensor, heads: int, head_dim: int, head_dim_v: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v of rows, without a copy."""
    k, v = rows.split([heads * head_dim, heads * head_dim_v], 1)
    return k.unflatten(1, (heads, head_dim)), v.unflatten(1, (heads, head_dim_v))


def in_pieces(k: torch.Tensor, v: torch.Tensor, most_tokens: int, pieces: int, side: Side) -> list[Piece]:
    """k and v in as many pieces, by heads, with room for most_tokens rows."""
    heads, found = k.shape[1] // pieces, []
    for piece in range(pieces):
        own = slice(piece * heads, (piece + 1) * heads)
        rows = room(k, v, most_tokens, heads)
        write(rows, k[:, own], v[:, own])
        found.append(Piece(rows, side.mark()))
    return found
