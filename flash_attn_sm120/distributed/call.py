"""A call of zigzag or ring attention: checked, agreed on, and computed by the one or the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flash_attn_sm120 import checks as forms
from flash_attn_sm120.distributed import checks
from flash_attn_sm120.distributed.agreement import agreed
from flash_attn_sm120.distributed.layout import Zigzag
from flash_attn_sm120.distributed.ranks import Ranks, ranks_of


class Options(NamedTuple):
    """As they came."""

    softmax_scale: Any
    causal: Any
    window_size: Any
    softcap: Any
    learnable_sink: Any


@dataclass(frozen=True)
class ZigzagCall:
    """Which tokens are whose, and in message what all ranks must have alike. options: what each launch gets besides
    tensors, lengths and a sink."""

    layout: Zigzag
    causal: bool
    options: dict[str, Any]
    pieces: int
    message: dict[str, Any]


# (ranks, q, k, v, sink, call) -> (out, lse), of packed tensors
Compute = Callable[
    [Ranks, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, ZigzagCall],
    tuple[torch.Tensor, torch.Tensor],
]


def run_packed(
    name: str, compute: Compute, group: Any, check_ranks: bool, q: Any, k: Any, v: Any, seqlens: Any, pieces: Any,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The public function `name`, whose arguments these are."""
    ranks = ranks_of(group)
    call = agreed(ranks, check_ranks, q, lambda: packed_call(name, ranks, q, k, v, seqlens, pieces, options))
    return compute(ranks, q, k, v, options.learnable_sink, call)


def run_batch(
    name: str, compute: Compute, group: Any, check_ranks: bool, q: Any, k: Any, v: Any, seqlen: Any, pieces: Any,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The same for q, k and v (batch, seqlen_local, heads, head_dim)."""
    ranks = ranks_of(group)
    call = agreed(ranks, check_ranks, q, lambda: batch_call(name, ranks, q, k, v, seqlen, pieces, options))
    out, lse = compute(ranks, packed(q), packed(k), packed(v), options.learnable_sink, call)
    return unpacked(out, lse, q.shape[0], q.shape[1])


def packed_call(
    name: str, ranks: Ranks, q: Any, k: Any, v: Any, seqlens: Any, pieces: Any, options: Options
) -> ZigzagCall:
    """Raises what is wrong on this rank."""
    layout = Zigzag(checks.check_seqlens(seqlens), ranks.world_size)
    checks.check_tokens(q, k, v, layout, ranks.rank)
    own = checks.check_options(q, *options)
    ranks.check_device(q.device)
    row_bytes = (k.shape[-1] + v.shape[-1]) * k.element_size()
    pieces = checks.check_pieces(pieces, k.shape[1], layout.most_tokens * row_bytes)
    message: dict[str, Any] = {"call": name, "dtype": forms.DTYPE_NAMES[q.dtype], "device": q.device.type}
    message |= {"heads": q.shape[1], "heads_kv": k.shape[1], "head_dim": q.shape[2], "head_dim_v": v.shape[2]}
    message |= {"seqlens": in_short(layout.seqlens), "pieces": pieces, **own}
    causal = own["mask"] != "full"
    launch = {"softmax_scale": own["softmax_scale"], "softcap": own["softcap"]}
    if own["mask"] == "local":
        launch["window_size"] = (own["window_size"][0], 0)
    return ZigzagCall(layout, causal, launch, pieces, message)


def batch_call(
    name: str, ranks: Ranks, q: Any, k: Any, v: Any, seqlen: Any, pieces: Any, options: Options
) -> ZigzagCall:
    """The same for q, k and v (batch, seqlen_local, heads, head_dim)."""
    checks.check_batch(q, k, v)
    seqlens = (checks.whole_seqlen(q, seqlen, ranks.world_size),) * q.shape[0]
    return packed_call(name, ranks, packed(q), packed(k), packed(v), seqlens, pieces, options)


def packed(x: torch.Tensor) -> torch.Tensor:
    """(batch, seqlen_local, heads, head_dim) -> (tokens, heads, head_dim), a view where strides allow."""
    return x.flatten(0, 1)


def unpacked(out: torch.Tensor, lse: torch.Tensor, batch: int, seqlen_local: int) -> tuple[torch.Tensor, torch.Tensor]:
    """out (tokens, heads, head_dim_v) and lse (heads, tokens) of a batch -> as flash_attn_func returns them."""
    lse = lse.view(-1, batch, seqlen_local).transpose(0, 1).contiguous()
    return out.view(batch, seqlen_local, *out.shape[1:]), lse


def in_short(seqlens: Sequence[int]) -> str:
    """A few lengths as they are, many by their number, sum and a digest."""
    if len(seqlens) <= 4:
        return str(list(seqlens))
    digest = hashlib.sha256(json.dumps(seqlens).encode()).hexdigest()[:16]
    return f"{len(seqlens)} sequences of {sum(seqlens)} tokens, digest {digest}"
