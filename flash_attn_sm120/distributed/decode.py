"""decode_context_parallel: each rank attends to its share of the keys, and all add up what all found.

Source: Dao et al., Flash-Decoding (2023), with ranks for splits; vLLM's decode context parallel has the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from flash_attn_sm120 import checks
from flash_attn_sm120.checks import describe, refuse
from flash_attn_sm120.checks_serving import check_sink
from flash_attn_sm120.combine import flash_attn_combine
from flash_attn_sm120.distributed.agreement import agreed
from flash_attn_sm120.distributed.ranks import Ranks, all_gather_single, ranks_of
from flash_attn_sm120.interface import flash_attn_varlen_func

ALIGNED = 4  # float32 values of 16 bytes, which the combine kernel reads at a time


@dataclass(frozen=True)
class Part:
    """What this rank's keys give."""

    out: torch.Tensor
    lse: torch.Tensor
    message: dict[str, Any]


def decode_context_parallel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cp_tot_seqused_k: torch.Tensor,
    group: Any = None,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    num_splits: int = 0,
    check_ranks: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries that every rank of a group has, over keys that are shared out among them. Forward only.

    Rank r has every world_size-th key of a sequence, from key r on: k[:, r::world_size] of whole ones. Each computes
    its part; one all-gather of out and lse, in float32, and flash_attn_combine make the whole on every rank.

    q: (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with cu_seqlens_q; the same on every rank.
    k, v: the rank's own keys, (batch, seqlen_k, heads_kv, head_dim / head_dim_v) or pools with page_table, as in
        flash_attn_varlen_func; seqlen_k and pools may differ in size between ranks.
    cp_tot_seqused_k: int32 (batch,), the keys of each sequence on all ranks together; how many of them are the rank's
        follows from it.
    group: as in zigzag_attention; of any size.
    max_seqlen_k: of the rank's own keys. num_splits: of the rank's own launch.
    The rest as in flash_attn_varlen_func; masks count positions over all ranks.
    check_ranks: as in zigzag_attention. With False a call has no host wait and can be captured in a CUDA graph.

    Returns (out, lse) on every rank: out of q's form and dtype with head_dim_v columns, lse float32 (batch, heads,
    seqlen_q), or (heads, total_q) for packed q.

    Raises as zigzag_attention does.
    """
    ranks = ranks_of(group)
    given: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    given |= {"page_table": page_table, "softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    given |= {"softcap": softcap, "alibi_slopes": alibi_slopes, "k_descale": k_descale, "v_descale": v_descale}
    given |= {"num_splits": num_splits}
    part = agreed(ranks, check_ranks, q, lambda: _part(ranks, q, k, v, cp_tot_seqused_k, learnable_sink, given))
    if ranks.world_size == 1:
        return part.out, part.lse
    parts, lses = _of_all(ranks, part)
    out, lse = flash_attn_combine(
        parts, lses.mT, out_dtype=q.dtype, cu_seqlens=cu_seqlens_q, learnable_sink=learnable_sink
    )
    return out, cast(torch.Tensor, lse).mT


def _part(ranks: Ranks, q: Any, k: Any, v: Any, total: Any, sink: torch.Tensor | None, given: dict[str, Any]) -> Part:
    """Runs this rank's part; its checks are those of the whole call."""
    if not isinstance(total, torch.Tensor) or total.dtype != torch.int32:
        refuse("cp_tot_seqused_k", "int32 of shape (batch,)", describe(total), TypeError)
    if not isinstance(q, torch.Tensor):
        refuse("q", "a torch.Tensor", describe(q), TypeError)
    if total.dim() != 1 or total.device != q.device:
        refuse("cp_tot_seqused_k", f"int32 of shape (batch,) on {q.device} as q", describe(total))
    ranks.check_device(q.device)
    count, rank = ranks.world_size, ranks.rank
    spread: dict[str, Any] = {"learnable_sink": sink}
    if count > 1:
        spread = {"cp_world_size": count, "cp_rank": rank, "cp_tot_seqused_k": total}
        if q.dim() > 1:
            check_sink(sink, q.shape[-2], q.device)  # which only the combine gets
    used = (total + (count - 1 - rank)) // count
    out, lse = flash_attn_varlen_func(q, k, v, seqused_k=used.int(), return_lse=True, **given, **spread)
    message: dict[str, Any] = {
        "call": "decode_context_parallel",
        "dtype": checks.DTYPE_NAMES[q.dtype],
        "device": q.device.type,
    }
    message |= {"q": list(q.shape), "heads_kv": k.shape[-2], "head_dim_v": v.shape[-1]}
    scale, softcap = checks.check_softmax_scale(given["softmax_scale"], q.shape[-1]), given["softcap"] or 0.0
    mask = list(checks.check_mask(given["causal"], given["window_size"]))
    message |= {"softmax_scale": scale, "softcap": float(softcap), "mask": mask}
    message |= {"sink": None if sink is None else str(sink.dtype), "alibi": given["alibi_slopes"] is not None}
    return Part(out, lse, message)


def _of_all(ranks: Ranks, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """All ranks' out (world_size, *out.shape) and lse (world_size, *lse.shape) in float32, by one all-gather."""
    count = part.out.numel()
    room = count + -(-part.lse.numel() // ALIGNED) * ALIGNED
    message = part.lse.new_empty(room)
    message[:count].view(part.out.shape).copy_(part.out)
    message[count : count + part.lse.numel()].view(part.lse.shape).copy_(part.lse)
    of_all = part.lse.new_empty(ranks.world_size * room)
    all_gather_single(of_all, message, group=ranks.group)
    of_all = of_all.view(ranks.world_size, room)
    lses = of_all[:, count : count + part.lse.numel()].unflatten(1, part.lse.shape)
    return of_all[:, :count].unflatten(1, part.out.shape), lses
