"""What attention over several ranks refuses on its own rank, before anything is sent."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from flash_attn_sm120 import checks, launchers
from flash_attn_sm120.checks import describe, refuse
from flash_attn_sm120.checks_serving import check_sink
from flash_attn_sm120.distributed.layout import Zigzag

MOST_PIECES = 8
PIECE_BYTES = 1 << 24  # from each rank, below which a piece more costs the host more than it hides


def check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        refuse(name, "an int", describe(value), TypeError)
    if value < least:
        refuse(name, f"an int >= {least}", value)


def check_seqlens(seqlens: Any) -> tuple[int, ...]:
    """On the host, as the sizes of what is sent follow from them."""
    if isinstance(seqlens, torch.Tensor) or not isinstance(seqlens, Sequence):
        refuse("seqlens", "a list of ints, the length of each whole sequence", describe(seqlens), TypeError)
    for index, seqlen in enumerate(seqlens):
        check_whole(f"seqlens[{index}]", seqlen, 0)
    return tuple(map(int, seqlens))


def whole_seqlen(q: torch.Tensor, seqlen: Any, world_size: int) -> int:
    """Of q (batch, seqlen_local, ...); None says that all ranks have the same."""
    if seqlen is None:
        if q.shape[1] % 2:
            refuse("seqlen", "an int, as chunks differ in length", f"None with {q.shape[1]} tokens on this rank")
        return q.shape[1] * world_size
    check_whole("seqlen", seqlen, 0)
    return int(seqlen)


def check_batch(q: Any, k: Any, v: Any) -> None:
    """q, k and v (batch, seqlen_local, heads, head_dim): what else they have to be is asked of the packed form."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            refuse(name, "a torch.Tensor", describe(x), TypeError)
        if x.dim() != 4:
            refuse(name, "(batch, seqlen_local, heads, head_dim)", describe(x))
    for name, x in (("k", k), ("v", v)):
        if x.shape[:2] != q.shape[:2]:
            refuse(name, f"batch and seqlen_local {tuple(q.shape[:2])} as q", describe(x))


def check_tokens(q: Any, k: Any, v: Any, layout: Zigzag, rank: int) -> None:
    """Packed q, k and v with a rank's tokens."""
    _check_packed(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[0] != layout.tokens(rank):
            expected = f"{layout.tokens(rank)} tokens, those of rank {rank} of {layout.world_size} in {layout.total}"
            refuse(name, expected, f"{x.shape[0]} ({describe(x)})")


def _check_packed(q: Any, k: Any, v: Any) -> None:
    if is_compiling():
        refuse("torch.compile", "a call outside of a compiled function", "one inside", NotImplementedError)
    marks = True  # stands for cu_seqlens, of which only the presence is looked at
    checks.check_tensors(q, k, v, marks, marks, paged=False)
    if k.dtype != q.dtype:
        refuse("k", f"{checks.DTYPE_NAMES[q.dtype]} as q", describe(k), NotImplementedError)
    checks.check_forward_only({"q": q, "k": k, "v": v})


def check_options(
    q: torch.Tensor, softmax_scale: Any, causal: Any, window_size: Any, softcap: Any, learnable_sink: Any
) -> dict[str, Any]:
    """What all ranks have to agree on, of the options."""
    mask, left, right = checks.check_mask(causal, window_size)
    scale = checks.check_softmax_scale(softmax_scale, q.shape[-1])
    softcap = checks.check_softcap(softcap)
    check_sink(learnable_sink, q.shape[-2], q.device)
    checks.check_forward_only({"learnable_sink": learnable_sink})
    if mask == "local" and right != 0:
        refuse("window_size", "(left, 0) or causal=True", describe(window_size), NotImplementedError)
    launchers.check_device(q.device)
    sink = None if learnable_sink is None else str(learnable_sink.dtype)
    return {"softmax_scale": scale, "softcap": softcap, "mask": mask, "window_size": [left, right], "sink": sink}


def check_pieces(pieces: Any, heads_kv: int, bytes_a_head: int) -> int:
    """Into how many parts K and V are cut by heads: as asked, or as many as bring PIECE_BYTES each."""
    if pieces is not None:
        check_whole("pieces", pieces, 1)
        if heads_kv % pieces:
            refuse("pieces", f"a number that divides {heads_kv} heads_kv", pieces)
        return int(pieces)
    most = min(MOST_PIECES, max(1, heads_kv * bytes_a_head // PIECE_BYTES))
    return max(count for count in range(1, most + 1) if heads_kv % count == 0)
