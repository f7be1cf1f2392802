"""From a call's arguments to a Call: every check that needs no address and no contents, the problem, its launcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from flash_attn_sm120 import checks, checks_serving, dispatch, launchers
from flash_attn_sm120.arguments import Numbers
from flash_attn_sm120.calls import Call, Options, Tensors
from flash_attn_sm120.changes import Changes, check_beside, check_blocks, check_change_values, problem_fields
from flash_attn_sm120.modifiers import constant_way, nothing, way_of
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.splits import Splits, choose_splits, decode_ways
from flash_attn_sm120.strides import has_tma_strides, has_whole_strides, reach


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: Tensors,
    options: Options,
    out: torch.Tensor | None,
    changes: Changes | None = None,
) -> Call:
    """Raises as flash_attn_func does."""
    batch = _check_forms(q, k, v, tensors, out)
    mask, numbers, v_scale = _check_options(q, k, tensors, options, batch)
    num_splits = checks_serving.check_num_splits(options.num_splits)
    problem = _problem(q, k, v, tensors, options.return_lse, mask, numbers, v_scale)
    if changes is not None:
        problem = _changed(problem, changes, q, k, tensors, options, num_splits, batch)
    problem, cut = _with_decode(problem, num_splits, q, k, tensors, options, numbers, batch)
    # strides choose a way for pools and dense calls only
    if problem.paged and not problem.decode:
        problem = replace(problem, tma_strides=all(map(has_tma_strides, (k, v))))
    elif not (problem.varlen or problem.paged or problem.decode):
        problem = replace(problem, tma_strides=all(map(has_tma_strides, (q, k, v))))

    packed_q, heads, heads_kv = problem.packed_q, q.shape[-2], k.shape[-2]
    out_shape = (*q.shape[:-1], v.shape[-1])
    lse_shape = (heads, q.shape[0]) if packed_q else (batch, heads, q.shape[1])
    launcher = None
    if batch == 0 or q.shape[0 if packed_q else 1] == 0:
        launchers.check_device(q.device)
    else:
        launcher, plan = launchers.load(problem, q.device), launchers.plan_of(problem, q.device)
    return Call(
        launcher,
        out_shape,
        lse_shape if options.return_lse else None,
        numbers,
        readable=all(map(has_whole_strides, (q, k, v))),
        writable=out is None or has_whole_strides(out),
        reaches=() if out is None else tuple(map(reach, (q, k, v, out))),
        device_index=q.device.index if q.is_cuda else None,
        modifiers=_modifiers(tensors, v_scale, (batch, heads), (batch, heads_kv), q.device),
        context_parallel=problem.context_parallel,
        num_splits=cut.num_splits if problem.decode else 0,
        lse_rows=lse_shape,
        tickets=cut.tickets,
        slots=cut.slots,
        takes_queue=launcher is not None and plan.kernel == "forward_tma",
        sm_count=launchers.sm_count(q.device) if launcher is not None and plan.persistent else 0,
        batch=batch,
        heads=heads,
    )


def _changed(
    problem: AttentionProblem,
    changes: Changes,
    q: torch.Tensor,
    k: torch.Tensor,
    tensors: Tensors,
    options: Options,
    num_splits: int,
    batch: int,
) -> AttentionProblem:
    """The problem with what changes it."""
    check_beside(changes, num_splits, options.cp_world_size, bool(problem.kv_dtype), problem.softcap, problem.alibi)
    packed = problem.packed_q
    rows = (options.max_seqlen_q or 0) if packed else q.shape[1]
    keys = _most_keys(k, tensors, options)
    check_blocks(changes, batch, q.shape[-2], rows, keys, q.device, exact=not problem.varlen)
    return replace(problem, **problem_fields(changes))


def check_values(
    q: torch.Tensor,
    k: torch.Tensor,
    tensors: Tensors,
    call: Call,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    changes: Changes | None = None,
) -> None:
    """What the tensors of a call that is right in form contain; waits for the device."""
    if changes is not None:
        check_change_values(changes, _room(k, tensors))
    table, used = tensors.page_table, tensors.seqused_k
    checks.check_length_values("q", q, tensors.cu_seqlens_q, tensors.seqused_q, max_seqlen_q)
    capacity = None if table is None else table.shape[1] * k.shape[1]
    checks.check_length_values("k", k, tensors.cu_seqlens_k, used, max_seqlen_k, capacity)
    if table is not None:
        checks_serving.check_page_values(table, used, *k.shape[:2])
    for name in ("k_descale", "v_descale"):
        if isinstance(factor := getattr(tensors, name), torch.Tensor):
            checks_serving.check_descale_values(name, factor)
    if tensors.cp_tot_seqused_k is not None and used is not None:
        numbers = call.numbers
        checks_serving.check_rank_values(used, tensors.cp_tot_seqused_k, numbers.cp_world_size, numbers.cp_rank)


def _check_forms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, out: torch.Tensor | None) -> int:
    """Kinds, dtypes, shapes and devices of all tensors but the scales; returns the batch."""
    paged = tensors.page_table is not None
    checks.check_tensors(q, k, v, tensors.cu_seqlens_q, tensors.cu_seqlens_k, paged)
    if paged:
        checks_serving.check_pool(k, tensors.cu_seqlens_k, tensors.seqused_k)
    if k.dtype in checks.FLOAT8_NAMES:
        checks_serving.check_float8(k, v)
    batch = checks.check_lengths(q, k, *tensors[:4], paged)
    if paged:
        checks_serving.check_page_table(tensors.page_table, batch, q.device)
    checks_serving.check_sink(tensors.learnable_sink, q.shape[-2], q.device)
    checks_serving.check_alibi(tensors.alibi_slopes, batch, q.shape[-2], q.device)
    if out is not None:
        checks.check_out(out, (*q.shape[:-1], v.shape[-1]), q.dtype, q.device)
    checks.check_forward_only({"q": q, "k": k, "v": v, "out": out})
    return batch


def _most_keys(k: torch.Tensor, tensors: Tensors, options: Options) -> int:
    """The most keys that a sequence can have."""
    room = _room(k, tensors)
    return room if options.max_seqlen_k is None else min(room, options.max_seqlen_k)


def _room(k: torch.Tensor, tensors: Tensors) -> int:
    """Keys that a sequence has room for."""
    if tensors.page_table is not None:
        return tensors.page_table.shape[1] * k.shape[1]
    return k.shape[0 if tensors.cu_seqlens_k is not None else 1]


def _check_options(
    q: torch.Tensor, k: torch.Tensor, tensors: Tensors, options: Options, batch: int
) -> tuple[str, Numbers, float | None]:
    """(mask of the AttentionProblem, what the kernel gets, v_descale if it is a number other than 1)."""
    checks.check_flag("return_lse", options.return_lse)
    mask, *window = checks.check_mask(options.causal, options.window_size)
    chunk = checks_serving.check_attention_chunk(options.attention_chunk)
    world_size, rank = options.cp_world_size, options.cp_rank
    ranks = checks_serving.check_context_parallel(world_size, rank, tensors.cp_tot_seqused_k, batch, q.device)
    scale = checks.check_softmax_scale(options.softmax_scale, q.shape[-1])
    softcap = checks.check_softcap(options.softcap)
    k_scale = checks_serving.check_descale("k_descale", tensors.k_descale, batch, k.shape[-2], q.device)
    v_scale = checks_serving.check_descale("v_descale", tensors.v_descale, batch, k.shape[-2], q.device)
    scale = checks_serving.check_scaled(scale, k_scale)
    return mask, Numbers(scale, softcap, *window, chunk, *ranks), None if v_scale == 1.0 else v_scale


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: Tensors,
    lse: bool,
    mask: str,
    numbers: Numbers,
    v_scale: float | None,
) -> AttentionProblem:
    """As the plain kernel would compute it."""
    alibi, chunked = tensors.alibi_slopes is not None, numbers.attention_chunk > 0
    return AttentionProblem(
        checks.DTYPE_NAMES[q.dtype],
        q.shape[-1],
        v.shape[-1],
        mask,
        softcap=numbers.softcap != 0.0,
        lse=lse,
        packed_q=tensors.cu_seqlens_q is not None,
        packed_k=tensors.cu_seqlens_k is not None,
        seqused_q=tensors.seqused_q is not None,
        seqused_k=tensors.seqused_k is not None,
        kv_dtype=checks.FLOAT8_NAMES.get(k.dtype, ""),
        page_size=0 if tensors.page_table is None else k.shape[1],
        k_descale=isinstance(tensors.k_descale, torch.Tensor),
        v_descale=isinstance(tensors.v_descale, torch.Tensor) or v_scale is not None,
        sink="" if tensors.learnable_sink is None else str(tensors.learnable_sink.dtype).removeprefix("torch."),
        alibi=alibi,
        chunked=chunked,
        # where no position counts, a rank's keys are keys like any others
        context_parallel=numbers.cp_world_size > 1 and (mask != "full" or chunked or alibi),
    )


def _with_decode(
    problem: AttentionProblem,
    num_splits: int,
    q: torch.Tensor,
    k: torch.Tensor,
    tensors: Tensors,
    options: Options,
    numbers: Numbers,
    batch: int,
) -> tuple[AttentionProblem, Splits]:
    """The decode kernel's problem where that is to be taken, and its parts; else the problem as it is."""
    rows = options.max_seqlen_q if problem.packed_q else q.shape[1]
    changed = any(getattr(problem, name) for name in dispatch.CHANGES)
    if changed or not dispatch.use_decode(rows, num_splits):
        return problem, Splits(1)
    rows = q.shape[0] if rows is None else rows
    keys = keys_in_sight(_most_keys(k, tensors, options), rows, numbers)
    sms = launchers.sm_count(q.device)
    cut = choose_splits(problem, sms, tuple(q.shape), k.shape[-2], batch, rows, keys, num_splits)
    return decode_ways(problem)[cut.num_splits > 1][0], cut


def keys_in_sight(keys: int, rows: int, numbers: Numbers) -> int:
    """An upper bound of the keys that `rows` neighbouring rows see together."""
    sight, chunk = min(keys, rows + numbers.window_left + numbers.window_right), numbers.attention_chunk
    return min(sight, chunk * (-(-rows // chunk) + 1)) if chunk else sight


def _modifiers(
    tensors: Tensors, v_scale: float | None, of_q: tuple[int, int], of_kv: tuple[int, int], device: torch.device
) -> tuple[Callable, ...] | None:
    """What makes the fields of arguments.Modifiers of the tensors given; None where there are none."""
    sink, slopes, k_descale, v_descale = tensors[6:]
    ways = (
        way_of("learnable_sink", sink, of_q[1:]),
        way_of("alibi_slopes", slopes, of_q),
        way_of("k_descale", k_descale, of_kv),
        way_of("v_descale", v_descale, of_kv) if v_scale is None else constant_way(v_scale, of_kv, device),
    )
    return None if all(way is nothing for way in ways) else ways
