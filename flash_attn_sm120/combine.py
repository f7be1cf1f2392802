"""flash_attn_combine: attention over all keys from that over parts of them.

Source: Dao et al., Flash-Decoding (2023); the shapes are flash-attn's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from flash_attn_sm120 import calls, checks, checks_serving, launchers
from flash_attn_sm120.dispatch import MAX_PARTS
from flash_attn_sm120.interface import signature
from flash_attn_sm120.problem import MAX_HEAD_DIM, CombineProblem
from flash_attn_sm120.strides import aligned, has_whole_strides, reach, target_for

OUT_DTYPES = {**checks.DTYPE_NAMES, torch.float32: "float32"}


class _Combine(NamedTuple):
    """What all calls with the same arguments but for addresses and contents have in common."""

    launcher: Any  # None: there is nothing to compute
    out_shape: tuple[int, ...]
    out_dtype: torch.dtype
    lse_shape: tuple[int, ...] | None
    writable: bool
    reaches: tuple[int, ...]
    device_index: int | None


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seqused: torch.Tensor | None = None,
    return_lse: bool = True,
    *,
    learnable_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out = sum over parts of exp(lse_part - lse) * out_part, lse = log of the sum of exp(lse_part).

    out_partial: (num_splits, batch, seqlen_q, heads, head_dim_v), or (num_splits, total_q, heads, head_dim_v); float32,
        at most 128 parts, as flash_attn_func and flash_attn_varlen_func return them for parts of the keys. Copied
        first if its address or strides aren't multiples of 16 bytes.
    lse_partial: (num_splits, batch, seqlen_q, heads) or (num_splits, total_q, heads) float32, natural log, any strides:
        their lse with the last two dimensions swapped. A part with -inf counts for nothing.
    out: (batch, seqlen_q, heads, head_dim_v) or (total_q, heads, head_dim_v), written in place and returned.
    out_dtype: bfloat16, float16 or float32; out's, or float32, if None.
    cu_seqlens: int32 (batch + 1,), where the sequences of a packed out_partial lie; rows past the last aren't written.
    seqused: int32 (batch,), rows of each sequence that take part; the others become 0, their lse -inf.
    learnable_sink: (heads,) bfloat16 or float32, one more logit for each row, for parts that were computed without it.

    Returns (out, lse), lse (batch, seqlen_q, heads) or (total_q, heads) float32, or None without return_lse. A row that
    no part has anything for is 0, its lse the sink, or -inf without one.

    Raises as flash_attn_func does.
    """
    if is_compiling():
        from flash_attn_sm120.integrations.torch_ops import combine_in_graph

        named: dict[str, Any] = {"out_dtype": out_dtype, "cu_seqlens": cu_seqlens, "seqused": seqused}
        named |= {"return_lse": return_lse, "learnable_sink": learnable_sink}
        return combine_in_graph(out_partial, lse_partial, out, named)
    return combine(out_partial, lse_partial, out, out_dtype, cu_seqlens, seqused, return_lse, learnable_sink)


def combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seqused: torch.Tensor | None = None,
    return_lse: bool = True,
    learnable_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """flash_attn_combine, right away."""
    key: tuple | None
    try:
        key = (
            signature(out_partial), signature(lse_partial), signature(out), out_dtype, signature(cu_seqlens),
            signature(seqused), return_lse, return_lse.__class__, signature(learnable_sink),
        )  # fmt: skip
        call = calls.known.get(key)
    except (AttributeError, TypeError):
        key = call = None
    if call is None:
        call = _prepare(out_partial, lse_partial, out, out_dtype, cu_seqlens, seqused, return_lse, learnable_sink)
        if key is not None:
            calls.remember(key, call)
    given = {"out_partial": out_partial, "lse_partial": lse_partial, "out": out, "learnable_sink": learnable_sink}
    checks.check_forward_only(given)
    out_partial, lse_partial = out_partial.detach(), lse_partial.detach()

    result = out_partial.new_empty(call.out_shape, dtype=call.out_dtype) if out is None else out
    lse = out_partial.new_empty(call.lse_shape) if call.lse_shape is not None else None
    if call.launcher is not None:
        target = result
        if out is not None:
            inputs = (out_partial, lse_partial)
            target = target_for(out, inputs, call.reaches, call.writable, cu_seqlens is not None)
        sink = None if learnable_sink is None else learnable_sink.detach()
        arguments = (aligned(out_partial), lse_partial.mT, target, lse, cu_seqlens, seqused, sink)
        if call.device_index is not None and call.device_index != torch.cuda.current_device():
            with torch.cuda.device(call.device_index):
                call.launcher(*arguments)
        else:
            call.launcher(*arguments)
        if target.data_ptr() != result.data_ptr():
            result.detach().copy_(target)
    return result, None if lse is None else lse.mT


def _prepare(
    out_partial: Any,
    lse_partial: Any,
    out: Any,
    out_dtype: Any,
    cu_seqlens: Any,
    seqused: Any,
    return_lse: Any,
    learnable_sink: Any,
) -> _Combine:
    """Every check that needs no address and no contents; finds the launcher."""
    checks.check_flag("return_lse", return_lse)
    _check_partials(out_partial, lse_partial)
    checks.check_forward_only({"out_partial": out_partial, "lse_partial": lse_partial})
    shape = tuple(out_partial.shape[1:])
    packed = len(shape) == 3
    checks.check_combined_lengths(out_partial, cu_seqlens, seqused)
    checks_serving.check_sink(learnable_sink, shape[-2], out_partial.device)
    dtype = _check_dtype(out, out_dtype)
    if out is not None:
        checks.check_out(out, shape, dtype, out_partial.device)
    problem = CombineProblem(
        OUT_DTYPES[dtype],
        shape[-1],
        lse=return_lse,
        packed=packed,
        cu_seqlens=cu_seqlens is not None,
        seqused=seqused is not None,
        sink="" if learnable_sink is None else str(learnable_sink.dtype).removeprefix("torch."),
    )
    launcher = None
    if 0 in shape:
        launchers.check_device(out_partial.device, "out_partial")
    else:
        launcher = launchers.load(problem, out_partial.device, "out_partial")
    lse_shape = (*shape[:-3], shape[-2], shape[-3])
    return _Combine(
        launcher,
        shape,
        dtype,
        lse_shape if return_lse else None,
        writable=out is None or has_whole_strides(out),
        reaches=() if out is None else tuple(map(reach, (out_partial, lse_partial, out))),
        device_index=out_partial.device.index if out_partial.is_cuda else None,
    )


def _check_partials(out_partial: Any, lse_partial: Any) -> None:
    """Kind, dtype, shape, last stride and device."""
    forms = "(num_splits, batch, seqlen_q, heads, head_dim_v) or (num_splits, total_q, heads, head_dim_v)"
    for name, tensor in (("out_partial", out_partial), ("lse_partial", lse_partial)):
        if not isinstance(tensor, torch.Tensor):
            checks.refuse(name, "a torch.Tensor", checks.describe(tensor), TypeError)
        if tensor.dtype != torch.float32:
            checks.refuse(name, "float32", checks.describe(tensor), TypeError)
    if out_partial.dim() not in (4, 5):
        checks.refuse("out_partial", forms, checks.describe(out_partial))
    if lse_partial.shape != out_partial.shape[:-1]:
        checks.refuse("lse_partial", f"shape {tuple(out_partial.shape[:-1])}", checks.describe(lse_partial))
    if lse_partial.device != out_partial.device:
        expected = f"a tensor on {out_partial.device} as out_partial"
        checks.refuse("lse_partial", expected, checks.describe(lse_partial))
    num_splits, head_dim_v = out_partial.shape[0], out_partial.shape[-1]
    if not 1 <= num_splits <= MAX_PARTS:
        checks.refuse("out_partial", f"from 1 to {MAX_PARTS} parts", f"{num_splits} ({checks.describe(out_partial)})")
    if head_dim_v % 8 or not 8 <= head_dim_v <= MAX_HEAD_DIM:
        expected = f"a head_dim_v that is a multiple of 8 from 8 to {MAX_HEAD_DIM}"
        checks.refuse("out_partial", expected, f"{head_dim_v} ({checks.describe(out_partial)})")
    if out_partial.stride(-1) != 1:
        checks.refuse("out_partial", "a last dimension of stride 1", f"strides {out_partial.stride()}")


def _check_dtype(out: Any, out_dtype: Any) -> torch.dtype:
    """That of the result."""
    names = "bfloat16, float16 or float32"
    if out is not None and not isinstance(out, torch.Tensor):
        checks.refuse("out", "a torch.Tensor", checks.describe(out), TypeError)
    if out_dtype is None:
        out_dtype = torch.float32 if out is None else out.dtype
        if out_dtype not in OUT_DTYPES:
            checks.refuse("out", names, checks.describe(out), TypeError)
    elif out_dtype not in OUT_DTYPES:
        checks.refuse("out_dtype", names, checks.describe(out_dtype), TypeError)
    return out_dtype
