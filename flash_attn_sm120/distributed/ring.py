"""ring_attention: K and V go round the ranks; each rank adds up what its queries get from the keys that it has in hand.

Source: Liu, Zaharia and Abbeel, Ring Attention (2023); with zigzag chunks: Zhu, ring-flash-attention (2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from flash_attn_sm120.distributed import gathered, rows
from flash_attn_sm120.distributed.agreement import agreed
from flash_attn_sm120.distributed.call import Options, ZigzagCall, batch_call, packed, packed_call, unpacked
from flash_attn_sm120.distributed.layout import Zigzag
from flash_attn_sm120.distributed.merge import add_sink, merge
from flash_attn_sm120.distributed.ranks import Ranks, ranks_of
from flash_attn_sm120.distributed.streams import Side
from flash_attn_sm120.distributed.two_chunks import attend, limits, places

HANDS = 3  # sets of keys at a time: one is read, one sent, one received


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
    check_ranks: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """zigzag_attention where memory is short: a rank never has more than three ranks' keys, whatever the world size.

    Each rank sends its K and V to the next one while it computes, world_size - 1 times; results are added up by lse in
    float32, each part rounded to q's dtype before. Arguments, results and errors are zigzag_attention's, without
    windows and pieces.
    """
    ranks = ranks_of(group)
    options = Options(softmax_scale, causal, (-1, -1), softcap, learnable_sink)
    call = agreed(ranks, check_ranks, q, lambda: batch_call("ring_attention", ranks, q, k, v, seqlen, None, options))
    out, lse = attention(ranks, packed(q), packed(k), packed(v), learnable_sink, call)
    return unpacked(out, lse, q.shape[0], q.shape[1])


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
    check_ranks: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ring_attention for packed sequences of different lengths: q, k, v, seqlens and results as in
    zigzag_attention_varlen."""
    ranks = ranks_of(group)
    options = Options(softmax_scale, causal, (-1, -1), softcap, learnable_sink)
    call = agreed(ranks, check_ranks, q, lambda: packed_call("ring_attention", ranks, q, k, v, seqlens, None, options))
    return attention(ranks, q, k, v, learnable_sink, call)


def attention(
    ranks: Ranks, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, call: ZigzagCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a checked call with packed tensors."""
    layout = call.layout
    if ranks.world_size == 1 or layout.total == 0:
        return gathered.attention(ranks, q, k, v, sink, call)
    own = places(layout, ranks.rank, q.device)
    early = own.early_rows
    if own.to_groups is not None:
        q = q.index_select(0, own.to_groups)
    part = q.new_empty(*q.shape[:-1], v.shape[-1])
    out = torch.empty_like(part, dtype=torch.float32)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for owner, keys, values in passed_round(ranks, k, v, layout):
        # Of a rank further on, only the late chunk has something to see, and sees all; of one before, both see its
        # early chunk and not its late one.
        first = early if call.causal and owner > ranks.rank else 0
        here = call.causal and owner == ranks.rank
        groups = (q[first:early], q[early:])
        marks = (torch.zeros_like(own.marks[0]), own.marks[1]) if first else own.marks[:2]
        _, _, lse0, lse1 = attend(
            groups, marks, keys, values, places(layout, owner, q.device).marks[2],
            _reach(layout, ranks.rank, owner, call.causal, q.device), here, call.options,
            (part[first:early], part[early:]),
        )  # fmt: skip
        found = torch.cat((lse0, lse1), 1)
        if owner == ranks.rank:
            out.copy_(part)
            lse.copy_(found)
        else:
            merge(out[first:], lse[:, first:], part[first:], found)
    if sink is not None:
        add_sink(out, lse, sink)
    out = part.copy_(out)
    if own.to_own is not None:
        out, lse = out.index_select(0, own.to_own), lse.index_select(1, own.to_own)
    return out, lse


def _reach(layout: Zigzag, rank: int, owner: int, causal: bool, device: torch.device) -> tuple:
    """Of the owner's keys of each sequence, in its own order, how many the rank's early and late chunks see."""
    early = tuple(len(pair[0]) for pair in layout.chunks(owner))
    both = tuple(len(pair[0]) + len(pair[1]) for pair in layout.chunks(owner))
    if not causal or owner > rank:
        return limits(both, device), limits(both, device)
    return limits(early, device), limits(both if owner == rank else early, device)


def passed_round(
    ranks: Ranks, k: torch.Tensor, v: torch.Tensor, layout: Zigzag
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(rank whose they are, k, v), this rank's own first; valid until two turns later, for what the caller launched
    until it asked for the next ones."""
    side = Side(k.device)
    hands = [rows.room(k, v, layout.most_tokens, k.shape[1]) for _ in range(min(HANDS, ranks.world_size))]
    rows.write(hands[0], k, v)
    ready = side.mark()
    used: list[Any] = []
    for turn in range(ranks.world_size):
        owner = (ranks.rank - turn) % ranks.world_size
        here = ready
        works: list[Any] = []
        if turn + 1 < ranks.world_size:
            with side:
                side.after(here)
                side.after(used[turn - 2] if turn >= 2 else None)
                works = _pass_on(ranks, hands[turn % HANDS], hands[(turn + 1) % HANDS])
        side.after(here)
        tokens = layout.tokens(owner)
        yield owner, *rows.split(hands[turn % HANDS][:tokens], k.shape[1], k.shape[-1], v.shape[-1])
        used.append(side.mark())
        with side:
            for work in works:
                work.wait()
            ready = side.mark()


def _pass_on(ranks: Ranks, out: torch.Tensor, into: torch.Tensor) -> list[Any]:
    """To the next rank, from the one before."""
    after, before = ((ranks.rank + step) % ranks.world_size for step in (1, -1))
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, out, ranks.global_rank(after), ranks.group),
            dist.P2POp(dist.irecv, into, ranks.global_rank(before), ranks.group),
        ]
    )
