"""torch.nn.functional.scaled_dot_product_attention and torch.nn.attention.varlen on these kernels, where PyTorch's
flash backend would run: register(), then torch.nn.attention.activate_flash_attention_impl("FLASH_ATTN_SM120").

What these kernels don't do goes on to the kernel that PyTorch had: gradients, dropout, the debug mask, and what
flash_attn_func and flash_attn_varlen_func refuse. The logger "flash_attn_sm120.sdpa" says why, at level DEBUG.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from flash_attn_sm120.checks import refuse
from flash_attn_sm120.interface import flash_attn_func, flash_attn_varlen_func

NAME = "FLASH_ATTN_SM120"
REFUSALS = (ValueError, TypeError, NotImplementedError)

_log = logging.getLogger("flash_attn_sm120.sdpa")


def register() -> None:
    """Makes the name known to PyTorch and changes nothing yet; once is enough, more does no harm.

    Raises NotImplementedError where PyTorch is older than 2.11."""
    attention = torch.nn.attention
    if not (hasattr(attention, "register_flash_attention_impl") and hasattr(torch.library, "get_kernel")):
        refuse(
            "torch", "2.11 or later, which has register_flash_attention_impl", torch.__version__, NotImplementedError
        )
    attention.register_flash_attention_impl(NAME, register_fn=override)


class Override:
    """Stands before PyTorch's kernels until it is removed."""

    def __init__(self, library: torch.library.Library) -> None:
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        """PyTorch's own kernels are back."""
        if self._library is not None:
            self._library._destroy()
            self._library = None


def override(dispatch_key: str = "CUDA") -> Override:
    """Puts these kernels before PyTorch's for a dispatch key; tests take "CPU". Returns what removes them.

    Of the three operators behind the flash backend those that PyTorch has are taken."""
    library = torch.library.Library("aten", "IMPL")
    for name, way in WAYS.items():
        if not hasattr(torch.ops.aten, name):
            continue
        try:
            own = torch.library.get_kernel(f"aten::{name}", dispatch_key)
        except RuntimeError:  # a build without the flash backend
            continue
        library.impl(name, _tried_first(way, own, name), dispatch_key, with_keyset=True)
    return Override(library)


def _tried_first(way: Callable, own: Any, name: str) -> Callable:
    """An operator's kernel: ours, else PyTorch's own."""

    def run(keyset: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return way(*arguments, **named)
        except REFUSALS as reason:
            _log.debug("%s goes to PyTorch's kernel: %s", name, reason)
        return own.call_boxed(keyset, *arguments, **named)

    return run


def dense_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple:
    """aten::_scaled_dot_product_flash_attention: query (batch, heads, seqlen_q, head_dim), key and value (batch,
    heads_kv, seqlen_k, head_dim). Returns what that does, out with query's layout. Raises one of REFUSALS for what
    isn't ours."""
    _check(query, key, value, dropout_p, return_debug_mask)
    out = torch.empty_like(query)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    own = out.transpose(1, 2)
    _, lse = flash_attn_func(q, k, v, softmax_scale=scale, causal=is_causal, out=own, return_lse=True)
    return out, lse, None, None, query.size(2), key.size(2), *_unused(query)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple:
    """aten::_flash_attention_forward: query (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with
    cum_seq_q. Returns what that does. Raises one of REFUSALS for what isn't ours."""
    _check(query, key, value, dropout_p, return_debug_mask)
    options: dict[str, Any] = {"softmax_scale": scale, "causal": is_causal, "alibi_slopes": alibi_slopes}
    options |= {"window_size": (window_size_left, window_size_right), "seqused_k": seqused_k, "out": out}
    if (cum_seq_q, cum_seq_k, block_table) != (None, None, None):
        options |= {"cu_seqlens_q": cum_seq_q, "cu_seqlens_k": cum_seq_k, "page_table": block_table}
        options |= {"max_seqlen_q": max_q, "max_seqlen_k": max_k}
    result, lse = flash_attn_varlen_func(query, key, value, num_splits=num_splits or 0, return_lse=True, **options)
    return result, lse, *_unused(query)


def forward_inplace(out: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    """aten::_flash_attention_forward_no_dropout_inplace: forward into out; returns lse."""
    return forward(*arguments, out=out, **named)[1]


WAYS: dict[str, Callable] = {
    "_scaled_dot_product_flash_attention": dense_sdpa,
    "_flash_attention_forward": forward,
    "_flash_attention_forward_no_dropout_inplace": forward_inplace,
}


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, return_debug_mask: bool
) -> None:
    """What the functions behind would do, but PyTorch's caller expects otherwise."""
    if dropout_p:
        refuse("dropout_p", "0, as PyTorch's backward couldn't draw the same", dropout_p, NotImplementedError)
    if return_debug_mask:
        refuse("return_debug_mask", "False", return_debug_mask, NotImplementedError)
    if value.shape[-1] != query.shape[-1]:
        refuse("value", f"a head_dim of {query.shape[-1]} as query", value.shape[-1], NotImplementedError)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        refuse("query, key, value", "no gradient", "requires_grad=True", NotImplementedError)


def _unused(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dropout's seed and offset, of which nothing is read, and no debug mask."""
    seed = query.new_empty(2, dtype=torch.uint64)
    return seed, query.new_empty((), dtype=torch.uint64), query.new_empty(0)
