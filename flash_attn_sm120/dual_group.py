"""fused_zigzag_llama3_flash_attn_varlen_forward: two query groups, each with a range of the same keys, in one launch.

Idea: all-gathered K and V with two query chunks a rank: Meta, Llama 3 (2024), section 3.3.2; zigzag: Zhu,
ring-flash-attention (2024).
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from flash_attn_sm120 import calls, checks, launchers
from flash_attn_sm120.arguments import Numbers
from flash_attn_sm120.checks_serving import check_sink
from flash_attn_sm120.interface import signature
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.strides import aligned, has_whole_strides, reach, target_for

ROUND_LSE = 128  # rows that the padded lse is rounded up to


class DualGroupCall(NamedTuple):
    """What all calls with the same arguments but for addresses and contents have in common; checked once."""

    launcher: Callable | None  # None: there is nothing to compute
    out_shapes: tuple[tuple[int, ...], ...]
    lse_shapes: tuple[tuple[int, ...], ...]
    numbers: Numbers
    limits: tuple[int, ...] | None  # None: they come as tensors
    readable: bool  # q0, q1, k and v have strides that the kernel can follow
    writable: tuple[bool, ...]  # out0 and out1, if given, have
    reaches: tuple[int, ...]  # bytes that q0, q1, k and v extend over
    device_index: int | None


def fused_zigzag_llama3_flash_attn_varlen_forward(
    q0: torch.Tensor,
    q1: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q0: torch.Tensor,
    cu_seqlens_q1: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q0: int | None,
    max_seqlen_q1: int | None,
    max_seqlen_k: int | None,
    max_kv_len_q0: int | torch.Tensor,
    max_kv_len_q1: int | torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    *,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    padded_lse: bool = False,
    out0: torch.Tensor | None = None,
    out1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of two groups of queries over the first keys of the same sequences. Forward only.

    q0: (total_q0, heads, head_dim), q1: (total_q1, heads, head_dim), bfloat16 or float16, packed; a group may be empty.
    k: (total_k, heads_kv, head_dim), v: (total_k, heads_kv, head_dim_v); heads % heads_kv == 0; head dims are multiples
        of 8 up to 256. Any strides with a contiguous last dimension, as in flash_attn_func.
    cu_seqlens_q0, cu_seqlens_q1, cu_seqlens_k: int32 (batch + 1,) of the same batch: sequence b is rows cu_seqlens[b]
        to [b + 1]. A sequence may have rows in either group, in both or in none.
    max_seqlen_q0, max_seqlen_q1, max_seqlen_k: the longest lengths, or more; None where padded_lse doesn't need them.
        out doesn't depend on them.
    max_kv_len_q0, max_kv_len_q1: group i of a sequence attends to its first min(max_kv_len_qi, seqlen_k) keys. An int,
        or int32 (batch,) on the device with a length for each sequence.
    softmax_scale: 1 / sqrt(head_dim) if None.
    causal: a group's last row of a sequence is aligned with the last key of its range (bottom-right).
    window_size, softcap, learnable_sink: as in flash_attn_func; positions are aligned likewise.
    dropout_p: 0; others raise NotImplementedError.
    padded_lse: lse as (batch * heads, seqlen), row b * heads + h, seqlen the max_seqlen_qi rounded up to a multiple of
        128, -inf where there is no row.
    out0, out1: of q0's and q1's form with head_dim_v columns, written in place and returned.

    Returns (out0, out1, lse0, lse1), lse float32 (heads, total_qi). A row that sees nothing is 0, its lse the sink, or
    -inf without one. Rows past cu_seqlens_qi[-1] belong to no sequence and are not written.

    Raises ValueError (shape, value, device), TypeError (kind, dtype) or NotImplementedError (valid, but not offered),
    before any launch, in the form `argument: expected ..., got ...`. Contents of the length tensors are checked with
    FLASH_ATTN_SM120_CHECK=1 only, as in flash_attn_varlen_func; else the kernel clamps them.
    """
    marks = (cu_seqlens_q0, cu_seqlens_q1, cu_seqlens_k)
    lengths = (max_seqlen_q0, max_seqlen_q1, max_seqlen_k)
    options = (softmax_scale, causal, window_size, softcap, dropout_p, padded_lse)
    key: tuple | None
    try:
        # True == 1 and hashes alike, but only one of them is a bool
        key = (
            "dual group", q0.shape, q0.stride(), q0.dtype, q0.get_device(), q1.shape, q1.stride(), q1.dtype,
            q1.get_device(), k.shape, k.stride(), k.dtype, k.get_device(), v.shape, v.stride(), v.dtype,
            v.get_device(), tuple(map(signature, marks)), signature(max_kv_len_q0), signature(max_kv_len_q1),
            signature(learnable_sink), signature(out0), signature(out1), options, causal.__class__,
            padded_lse.__class__, dropout_p.__class__, lengths,
        )  # fmt: skip
        call = calls.known.get(key)
    except (AttributeError, TypeError):
        key = call = None
    limits: tuple = (max_kv_len_q0, max_kv_len_q1)
    outs = (out0, out1)
    if call is None:
        call = _prepare((q0, q1), k, v, marks, lengths, limits, learnable_sink, outs, options)
        if key is not None:
            calls.remember(key, call)
    if q0.requires_grad or q1.requires_grad or k.requires_grad or v.requires_grad:
        checks.check_forward_only({"q0": q0, "q1": q1, "k": k, "v": v})
        q0, q1, k, v = (tensor.detach() for tensor in (q0, q1, k, v))
    if not (learnable_sink is out0 is out1 is None):
        checks.check_forward_only({"learnable_sink": learnable_sink, "out0": out0, "out1": out1})
        learnable_sink = None if learnable_sink is None else learnable_sink.detach()
    if checks.VALUE_CHECKS:
        _check_values((q0, q1), k, marks, lengths)

    results = (
        q0.new_empty(call.out_shapes[0]) if out0 is None else out0,
        q0.new_empty(call.out_shapes[1]) if out1 is None else out1,
    )
    lse0, lse1 = (q0.new_empty(shape, dtype=torch.float32) for shape in call.lse_shapes)
    if padded_lse:
        for lse in (lse0, lse1):
            lse.fill_(-math.inf)
    if call.launcher is not None:
        targets: Sequence[torch.Tensor] = results
        if not (out0 is out1 is None):
            targets = _targets(outs, results, (q0, q1, k, v), call)
        if not call.readable or (q0.data_ptr() | q1.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
            q0, q1, k, v = map(aligned, (q0, q1, k, v))
        if call.limits is not None:
            limits = call.limits
        elif not (isinstance(max_kv_len_q0, torch.Tensor) and isinstance(max_kv_len_q1, torch.Tensor)):
            limits = tuple(_as_tensor(limit, marks[2]) for limit in limits)
        arguments = (q0, q1, k, v, *targets, lse0, lse1, (*marks, *limits), learnable_sink, call.numbers)
        if call.device_index is not None and call.device_index != torch.cuda.current_device():
            with torch.cuda.device(call.device_index):
                call.launcher(*arguments)
        else:
            call.launcher(*arguments)
        if targets is not results:
            for target, result in zip(targets, results, strict=True):
                if target.data_ptr() != result.data_ptr():
                    result.detach().copy_(target)
    return (*results, lse0, lse1)


def _targets(outs: tuple, results: tuple, inputs: tuple, call: DualGroupCall) -> list[torch.Tensor]:
    """results, or temporaries where the kernel can't write them."""
    targets = []
    for out, result, writable in zip(outs, results, call.writable, strict=True):
        reaches = (*call.reaches, reach(result))
        targets.append(result if out is None else target_for(out, inputs, reaches, writable, True))
    return targets


def _as_tensor(limit: int | torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    if isinstance(limit, torch.Tensor):
        return limit
    return torch.full((marks.shape[0] - 1,), min(limit, checks.UNBOUNDED), dtype=torch.int32, device=marks.device)


@contextmanager
def _about_group(group: int) -> Iterator[None]:
    """Checks speak of q; in what they raise here it has the group's number."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        text = re.sub(r"\b(q|out|cu_seqlens_q|seqlen_q|max_seqlen_q)\b", rf"\g<1>{group}", str(error))
        raise type(error)(text) from None


def _prepare(
    qs: tuple, k: Any, v: Any, marks: tuple, lengths: tuple, limits: tuple, sink: Any, outs: tuple, options: tuple
) -> DualGroupCall:
    """Every check that needs no address and no contents; finds the launcher."""
    softmax_scale, causal, window_size, softcap, dropout_p, padded_lse = options
    batch = _check_forms(qs, k, v, marks, outs)
    check_sink(sink, qs[0].shape[1], k.device)
    mask, *window = checks.check_mask(causal, window_size)
    scale = checks.check_softmax_scale(softmax_scale, k.shape[-1])
    softcap = checks.check_softcap(softcap)
    check_no_dropout(dropout_p)
    checks.check_flag("padded_lse", padded_lse)
    for name, value in zip(("q0", "q1", "k"), lengths, strict=True):
        checks.check_max_seqlen(f"max_seqlen_{name}", value)
        if padded_lse and name != "k" and value is None:
            checks.refuse(f"max_seqlen_{name}", "an int beside padded_lse, whose rows it counts", "None")
    for group, limit in enumerate(limits):
        _check_limit(f"max_kv_len_q{group}", limit, batch, k.device)
    as_tensors = any(isinstance(limit, torch.Tensor) for limit in limits)
    problem = AttentionProblem(
        checks.DTYPE_NAMES[k.dtype],
        k.shape[-1],
        v.shape[-1],
        mask,
        softcap=softcap != 0.0,
        lse=True,
        packed_q=True,
        packed_k=True,
        seqused_k=as_tensors,
        sink="" if sink is None else str(sink.dtype).removeprefix("torch."),
        dual_group=True,
        padded_lse=padded_lse,
    )
    heads, launcher = qs[0].shape[1], None
    if batch == 0 or not any(q.shape[0] for q in qs):
        launchers.check_device(k.device, "k")
    else:
        launcher = launchers.load(problem, k.device, "k")
    if padded_lse:
        lse_shapes = tuple((batch * heads, -(-length // ROUND_LSE) * ROUND_LSE) for length in lengths[:2])
    else:
        lse_shapes = tuple((heads, q.shape[0]) for q in qs)
    return DualGroupCall(
        launcher,
        tuple((*q.shape[:-1], v.shape[-1]) for q in qs),
        lse_shapes,
        Numbers(scale, softcap, *window),
        limits=None if as_tensors else tuple(min(int(limit), checks.UNBOUNDED) for limit in limits),
        readable=all(map(has_whole_strides, (*qs, k, v))),
        writable=tuple(out is None or has_whole_strides(out) for out in outs),
        reaches=tuple(map(reach, (*qs, k, v))),
        device_index=k.device.index if k.is_cuda else None,
    )


def _check_forms(qs: tuple, k: Any, v: Any, marks: tuple, outs: tuple) -> int:
    """Kinds, dtypes, shapes and devices; returns the batch."""
    batches = []
    for group, (q, out) in enumerate(zip(qs, outs, strict=True)):
        with _about_group(group):
            for name, given in (("cu_seqlens_q", marks[group]), ("cu_seqlens_k", marks[2])):
                if given is None:
                    checks.refuse(name, "int32 of shape (batch + 1,)", "None")
            checks.check_tensors(q, k, v, marks[group], marks[2], paged=False)
            if k.dtype != q.dtype:
                checks.refuse("k", "bfloat16 or float16", checks.describe(k), NotImplementedError)
            batches.append(checks.check_lengths(q, k, marks[group], marks[2], None, None, paged=False))
            if out is not None:
                checks.check_out(out, (*q.shape[:-1], v.shape[-1]), q.dtype, q.device)
            checks.check_forward_only({"q": q, "k": k, "v": v, "out": out})
    if qs[1].shape[1] != qs[0].shape[1]:
        checks.refuse("q1", f"{qs[0].shape[1]} heads as q0", checks.describe(qs[1]))
    return batches[0]


def check_no_dropout(dropout_p: Any) -> None:
    if isinstance(dropout_p, (bool, torch.Tensor)) or not isinstance(dropout_p, numbers.Real):
        checks.refuse("dropout_p", "a number", checks.describe(dropout_p), TypeError)
    if dropout_p != 0:
        checks.refuse("dropout_p", "0 for two query groups", dropout_p, NotImplementedError)


def _check_limit(name: str, limit: Any, batch: int, device: torch.device) -> None:
    expected = "an int >= 0, or int32 of shape (batch,)"
    if isinstance(limit, torch.Tensor):
        if limit.dtype != torch.int32:
            checks.refuse(name, expected, checks.describe(limit), TypeError)
        if limit.shape != (batch,) or (batch > 1 and limit.stride(0) != 1):
            checks.refuse(name, f"{expected}, contiguous, with a batch of {batch}", checks.describe(limit))
        if limit.device != device:
            checks.refuse(name, f"a tensor on {device} as k", checks.describe(limit))
    elif isinstance(limit, bool) or not isinstance(limit, numbers.Integral):
        checks.refuse(name, expected, checks.describe(limit), TypeError)
    elif limit < 0:
        checks.refuse(name, expected, limit)


def _check_values(qs: tuple, k: torch.Tensor, marks: tuple, lengths: tuple) -> None:
    """What the length tensors contain; waits for the device."""
    for group, q in enumerate(qs):
        with _about_group(group):
            checks.check_length_values("q", q, marks[group], None, lengths[group])
    checks.check_length_values("k", k, marks[2], None, lengths[2])
