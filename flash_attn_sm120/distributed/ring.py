"""ring_attention: K and V go round the ranks; each rank adds up what its queries get from the keys that it has in hand.

Source: Liu, Zaharia and Abbeel, Ring Attention (2023); with zigzag chunks: Zhu, ring-flash-attention (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from flash_attn_sm120.distributed import gathered, rows
from flash_attn_sm120.distributed.call import Options, ZigzagCall, run_batch, run_packed
from flash_attn_sm120.distributed.layout import Zigzag
from flash_attn_sm120.distributed.merge import Total
from flash_attn_sm120.distributed.ranks import Ranks
from flash_attn_sm120.distributed.streams import Side
from flash_attn_sm120.distributed.two_chunks import attend, limits, places


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: Any = None,
    *,
    seqlen: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    pieces: int | None = None,
    check_ranks: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """zigzag_attention where memory is short: what a rank needs doesn't grow with the world size.

    Each rank sends its K and V to the next one while it computes, world_size - 1 times; results are added up by lse in
    float32, each part rounded to q's dtype before. That is done with one piece of heads_kv after the other, so that
    beside out a rank has a second copy of its K and V, and for a piece two ranks' K and V and 6 bytes a value of out.
    Arguments, results and errors are zigzag_attention's, without windows.
    """
    options = Options(softmax_scale, causal, (-1, -1), softcap, learnable_sink)
    return run_batch("ring_attention", attention, group, check_ranks, q, k, v, seqlen, pieces, options)


def ring_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens: Sequence[int],
    group: Any = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    pieces: int | None = None,
    check_ranks: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ring_attention for packed sequences of different lengths: q, k, v, seqlens and results as in
    zigzag_attention_varlen."""
    options = Options(softmax_scale, causal, (-1, -1), softcap, learnable_sink)
    return run_packed("ring_attention", attention, group, check_ranks, q, k, v, seqlens, pieces, options)


def attention(
    ranks: Ranks, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, call: ZigzagCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a checked call with packed tensors."""
    layout, ratio = call.layout, q.shape[1] // k.shape[1]
    if ranks.world_size == 1 or layout.total == 0:
        return gathered.attention(ranks, q, k, v, sink, call)
    own = places(layout, ranks.rank, q.device)
    early = own.early_rows
    q = own.in_group_order(q)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    count = k.shape[1] // call.pieces * ratio  # heads of a piece
    part = out.new_empty(out.shape[0], count, out.shape[2])
    total = Total(part)
    waiting: list[Callable[[], None]] = []
    for piece, turn, owner, keys, values in passed_round(ranks, k, v, layout, call.pieces):
        # What the launch before found is added up now: meanwhile the transfer of the next keys, which waits for that
        # launch, gets its place on the GPU, on all ranks at about the same time: see CONFLICTS_LOG.md, 36.
        _do(waiting)
        heads = slice(piece * count, (piece + 1) * count)
        # Of a rank further on, only the late chunk has something to see, and sees all; of one before, both see its
        # early chunk and not its late one.
        first = early if call.causal and owner > ranks.rank else 0
        marks = (torch.zeros_like(own.marks[0]), own.marks[1]) if first else own.marks[:2]
        _, _, lse0, lse1 = attend(
            (q[first:early, heads], q[early:, heads]), marks, keys, values, places(layout, owner, q.device).marks[2],
            _reach(layout, ranks.rank, owner, call.causal, q.device), call.causal and owner == ranks.rank, call.options,
            (part[first:early], part[early:]),
        )  # fmt: skip
        waiting.append(partial(total.add, part[first:], torch.cat((lse0, lse1), 1), first, anew=turn == 0))
        if turn + 1 == ranks.world_size:
            waiting.append(partial(total.write, out[:, heads], lse[heads], None if sink is None else sink[heads]))
    _do(waiting)
    return own.in_own_order(out, lse)


def _do(waiting: list[Callable[[], None]]) -> None:
    for each in waiting:
        each()
    waiting.clear()


def _reach(layout: Zigzag, rank: int, owner: int, causal: bool, device: torch.device) -> tuple:
    """Of the owner's keys of each sequence, in its own order, how many the rank's early and late chunks see."""
    early = tuple(len(pair[0]) for pair in layout.chunks(owner))
    both = tuple(len(pair[0]) + len(pair[1]) for pair in layout.chunks(owner))
    if not causal or owner > rank:
        return limits(both, device), limits(both, device)
    return limits(early, device), limits(both if owner == rank else early, device)


def passed_round(
    ranks: Ranks, k: torch.Tensor, v: torch.Tensor, layout: Zigzag, pieces: int
) -> Iterator[tuple[int, int, int, torch.Tensor, torch.Tensor]]:
    """(piece, turn, rank whose they are, k, v) of some heads, this rank's own first; valid for what the caller launches
    until it asks for the next ones."""
    side, world, heads = Side(k.device), ranks.world_size, k.shape[1] // pieces
    hands = [rows.room(k, v, layout.most_tokens, heads) for _ in range(min(2, world - 1))]
    used = None
    for piece, (in_hand, written) in enumerate(rows.in_pieces(k, v, layout.most_tokens, pieces, side)):
        arrived = written
        for turn in range(world):
            works: list[Any] = []
            into = hands[turn % 2] if turn + 1 < world else in_hand
            if turn + 1 < world:
                with side:
                    side.after(arrived)
                    side.after(used)  # what was in the other hand is
                    works = _pass_on(ranks, in_hand, into)
            side.after(arrived)
            owner = (ranks.rank - turn) % world
            own = in_hand[: layout.tokens(owner)]
            yield piece, turn, owner, *rows.split(own, heads, k.shape[-1], v.shape[-1])
            used = side.mark()
            with side:
                for work in works:
                    work.wait()
                arrived = side.mark()
            in_hand = into


def _pass_on(ranks: Ranks, out: torch.Tensor, into: torch.Tensor) -> list[Any]:
    """To the next rank, from the one before."""
    after, before = ((ranks.rank + step) % ranks.world_size for step in (1, -1))
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, out, ranks.global_rank(after), ranks.group),
            dist.P2POp(dist.irecv, into, ranks.global_rank(before), ranks.group),
        ]
    )
