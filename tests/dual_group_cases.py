"""Calls of two query groups, and how they are checked: against the reference, and against a call for each group."""

import math

import torch
from oracle import assert_result, marks, rand

from flash_attn_sm120 import flash_attn_varlen_func, fused_zigzag_llama3_flash_attn_varlen_forward
from flash_attn_sm120.matrix import LSE_SLACK, largest_difference


def run(
    device, lengths_q, lengths_k, limits, *, heads=(4, 2), head_dims=(64, 64), dtype=torch.bfloat16, causal=True,
    padded_lse=False, spare=0, as_tensors=False, separate=False, **options,
):  # fmt: skip
    """lengths_q: of both groups. limits: max_kv_len of both. heads: (heads, heads_kv). spare: rows behind the last
    sequence, which must stay as they are. as_tensors: limits come a sequence. separate: compare with two calls too."""
    (heads, heads_kv), (head_dim, head_dim_v), batch = heads, head_dims, len(lengths_k)
    qs = [rand(device, sum(lengths) + spare, heads, head_dim, dtype=dtype) for lengths in lengths_q]
    k = rand(device, sum(lengths_k), heads_kv, head_dim, dtype=dtype)
    v = rand(device, sum(lengths_k), heads_kv, head_dim_v, dtype=dtype)
    outs = [torch.full((*q.shape[:-1], head_dim_v), math.nan, dtype=dtype, device=device) for q in qs]
    limits = [
        torch.tensor([limit] * batch if isinstance(limit, int) else limit, dtype=torch.int32, device=device)
        for limit in limits
    ]
    marks_q, marks_k = [marks(device, *lengths) for lengths in lengths_q], marks(device, *lengths_k)
    longest = [max(lengths, default=0) for lengths in (*lengths_q, lengths_k)]
    given = limits if as_tensors else [int(limit[0]) for limit in limits]
    options["causal"] = causal
    *found, lse0, lse1 = fused_zigzag_llama3_flash_attn_varlen_forward(
        *qs, k, v, *marks_q, marks_k, *longest, *given, padded_lse=padded_lse, out0=outs[0], out1=outs[1], **options
    )
    assert found[0] is outs[0] and found[1] is outs[1]
    for group, lse in enumerate((lse0, lse1)):
        if padded_lse:
            lse = packed_lse(lse, lengths_q[group], heads, spare)
        used = torch.minimum(limits[group], marks_k.diff())
        lengths = {"cu_seqlens_q": marks_q[group], "cu_seqlens_k": marks_k, "seqused_k": used}
        if sum(lengths_q[group]) == 0:
            assert outs[group].isnan().all()
            continue
        limit = assert_result(outs[group], lse, qs[group], k, v, **lengths, **options)
        if separate:
            rows = sum(lengths_q[group])
            own, own_lse = flash_attn_varlen_func(qs[group], k, v, **lengths, **options, return_lse=True)
            assert largest_difference(outs[group][:rows], own[:rows]) <= 2 * limit
            assert largest_difference(lse[:, :rows], own_lse[:, :rows]) <= 2 * LSE_SLACK


def packed_lse(lse, lengths, heads, spare):
    """(batch * heads, rounded seqlen) -> (heads, total); what stands where no row is must be -inf."""
    assert lse.shape == (len(lengths) * heads, -(-max(lengths) // 128) * 128)
    parts = []
    for own, length in zip(lse.unflatten(0, (-1, heads)), lengths, strict=True):
        assert (own[:, length:] == -math.inf).all()
        parts.append(own[:, :length])
    return torch.cat([*parts, lse.new_zeros(heads, spare)], 1)


def run_variant(problem, lengths_q, lengths_k, device):
    """Sequences where a group's range is 0, where one has no rows, and where ranges lie apart in a window."""
    ranges = [(90, 7, 0), (150, 20, 40)]
    options = {"window_size": (50, 9)} if problem.mask == "local" else {}
    if problem.softcap:
        options["softcap"] = 3.0
    if problem.sink:
        options["learnable_sink"] = rand(device, 4, dtype=getattr(torch, problem.sink))
    if not problem.seqused_k:
        ranges = [(70,) * 3, (140,) * 3]
    run(
        device, [lengths_q, lengths_q[::-1]], lengths_k, ranges,
        head_dims=(problem.head_dim, problem.head_dim_v), dtype=getattr(torch, problem.dtype),
        causal=problem.mask == "causal", padded_lse=problem.padded_lse, as_tensors=problem.seqused_k, **options,
    )  # fmt: skip
