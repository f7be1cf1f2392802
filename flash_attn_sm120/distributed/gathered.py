"""zigzag_attention: each rank's two chunks of queries over the keys of all ranks, which are gathered piece by piece.

Source: Meta, Llama 3 (2024), section 3.3.2: all-gather of K and V, which GQA keeps small; zigzag: Zhu,
ring-flash-attention (2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from flash_attn_sm120.distributed import rows
from flash_attn_sm120.distributed.call import Options, ZigzagCall, run_batch, run_packed
from flash_attn_sm120.distributed.layout import Zigzag
from flash_attn_sm120.distributed.ranks import Ranks, all_gather_single
from flash_attn_sm120.distributed.shards import rows_of_ranks
from flash_attn_sm120.distributed.streams import Side
from flash_attn_sm120.distributed.two_chunks import attend, key_marks, limits, places

Pieces = Iterator[tuple[slice, torch.Tensor, torch.Tensor]]


def zigzag_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: Any = None,
    *,
    seqlen: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    pieces: int | None = None,
    check_ranks: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch of sequences that are spread over the ranks of a group in a zigzag. Forward only.

    Every rank of the group calls it with the tokens that shard(x, rank, world_size) gives it: chunks rank and
    2 * world_size - 1 - rank of each sequence. K and V of all ranks are gathered, some KV heads at a time, the next
    ones while attention to those before runs; beside out a rank has a second copy of its K and V, and three such pieces
    of whole sequences.

    q: (batch, seqlen_local, heads, head_dim), k: (batch, seqlen_local, heads_kv, head_dim), v: (batch, seqlen_local,
        heads_kv, head_dim_v), bfloat16 or float16; as in flash_attn_func. Ranks may differ in seqlen_local, also
        have 0.
    group: a ProcessGroup of torch.distributed, None for all processes; of any size, with a backend for q's device: NCCL
        for GPUs.
    seqlen: tokens of a whole sequence; None: seqlen_local * world_size, where all chunks are of one length.
    softmax_scale, softcap, learnable_sink: as in flash_attn_func.
    causal: a token sees the tokens of its sequence up to itself.
    window_size: (left, 0), or (left, -1) beside causal: up to left tokens before itself; others raise
        NotImplementedError.
    pieces: into how many parts heads_kv is cut, which it has to be a multiple of; None: up to 8, fewer where a part
        would be less than 16 MiB a rank.
    check_ranks: all ranks tell one another, in a message of 2 KiB, what they have, so that what is wrong on one is an
        error on every rank. The host waits for it: for the group's CPU backend if it has one, else for a small
        collective on the GPU (not for what was launched before on the caller's stream). False: no message; then a
        wrong call on one rank leaves the others waiting, until the backend's timeout. The same on all ranks.

    Returns (out, lse) of the rank's tokens: (batch, seqlen_local, heads, head_dim_v) of q's dtype and (batch, heads,
    seqlen_local) float32.

    Raises ValueError, TypeError or NotImplementedError before anything large is sent, in the form `argument: expected
    ..., got ...`; for what is wrong on another rank the text begins with `rank N: `. A rank that is gone is an
    error of the backend, at the latest after the group's timeout.
    """
    options = Options(softmax_scale, causal, window_size, softcap, learnable_sink)
    return run_batch("zigzag_attention", attention, group, check_ranks, q, k, v, seqlen, pieces, options)


def zigzag_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens: Sequence[int],
    group: Any = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    pieces: int | None = None,
    check_ranks: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """zigzag_attention for packed sequences of different lengths.

    q: (tokens, heads, head_dim), k: (tokens, heads_kv, head_dim), v: (tokens, heads_kv, head_dim_v): what
        shard_varlen(x, seqlens, rank, world_size) gives the rank.
    seqlens: tokens of each whole sequence, ints, on every rank the same; a length may be anything from 0 on.

    Returns (out, lse): (tokens, heads, head_dim_v) and float32 (heads, tokens). The rest as in zigzag_attention.
    """
    options = Options(softmax_scale, causal, window_size, softcap, learnable_sink)
    return run_packed("zigzag_attention", attention, group, check_ranks, q, k, v, seqlens, pieces, options)


def attention(
    ranks: Ranks, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, call: ZigzagCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a checked call with packed tensors."""
    layout, ratio = call.layout, q.shape[1] // k.shape[1]
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    if layout.total == 0:
        return out, lse
    own = places(layout, ranks.rank, q.device)
    early = own.early_rows
    q = own.in_group_order(q)
    chunks = layout.chunks(ranks.rank)
    ends = [
        tuple(pair[group].stop if call.causal else whole for pair, whole in zip(chunks, layout.seqlens, strict=True))
        for group in range(2)
    ]
    reach = (limits(ends[0], q.device), limits(ends[1], q.device))
    for heads_kv, keys, values in gathered(ranks, k, v, layout, call.pieces):
        heads = slice(heads_kv.start * ratio, heads_kv.stop * ratio)
        _, _, lse0, lse1 = attend(
            (q[:early, heads], q[early:, heads]), own.marks[:2], keys, values, key_marks(layout, q.device), reach,
            call.causal, {**call.options, "learnable_sink": None if sink is None else sink[heads]},
            (out[:early, heads], out[early:, heads]),
        )  # fmt: skip
        lse[heads, :early] = lse0
        lse[heads, early:] = lse1
    return own.in_own_order(out, lse)


def gathered(ranks: Ranks, k: torch.Tensor, v: torch.Tensor, layout: Zigzag, pieces: int) -> Pieces:
    """(KV heads, k, v) of the whole sequences, piece by piece; valid for what the caller launches until it asks for the
    next one."""
    if ranks.world_size == 1:
        yield slice(0, k.shape[1]), k, v
        return
    heads, order = k.shape[1] // pieces, rows_of_ranks(layout, k.device)
    side, works = Side(k.device), []
    received = [rows.room(k, v, layout.most_tokens * ranks.world_size, heads) for _ in range(min(pieces, 2))]
    whole = rows.room(k, v, layout.total, heads)
    sent = rows.in_pieces(k, v, layout.most_tokens, pieces, side)
    used = None

    def start(piece: int) -> None:
        with side:
            side.after(sent[piece].written)
            side.after(used)
            into = received[piece % 2]
            works.append(all_gather_single(into, sent[piece].rows, group=ranks.group, async_op=True))

    start(0)
    for piece in range(pieces):
        if piece + 1 < pieces:
            # When the launch before is done and while the rows are ordered, so that the collective has its place on
            # the GPU, on all ranks at about the same time, before attention fills it: see CONFLICTS_LOG.md, 36.
            start(piece + 1)
        works[piece].wait()
        torch.index_select(received[piece % 2], 0, order, out=whole)
        own = slice(piece * heads, (piece + 1) * heads)
        yield own, *rows.split(whole, heads, k.shape[-1], v.shape[-1])
        used = side.mark()
