"""One call of the public functions against the reference, by the tolerance of the package."""

import itertools
import math
from dataclasses import fields

import torch

from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func, reference
from flash_attn_sm120.matrix import LSE_SLACK, SLACK, largest_difference
from flash_attn_sm120.problem import AttentionProblem, Mod

FEW = 1024  # outputs, below which PyTorch's error is luck: the limit is then at least a rounding of weights and of out
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
SPEED = ("max_seqlen_q", "max_seqlen_k", "num_splits", "scheduler_metadata")  # what doesn't change the result


def rand(device, *shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=device, dtype=dtype)


def marks(device, *lengths):
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def ints(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_right(q, k, v, *, out=None, with_lse=True, clean=None, **options):
    """Runs into a NaN-filled out, checks out and lse with the rows that no sequence names left alone; returns both.

    clean: k and v for the reference, which multiplies by 0 what it masks, where those given hold NaN."""
    if out is None:
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    out.fill_(math.nan)
    function = flash_attn_varlen_func if any(name in options for name in LENGTHS) else flash_attn_func
    returned = function(q, k, v, out=out, return_lse=with_lse, **options)
    result, lse = returned if with_lse else (returned, None)
    assert result is out
    options = {name: value for name, value in options.items() if name not in SPEED}
    assert_result(out, lse, q, *(clean or (k, v)), **options)
    return out, lse


def assert_result(out, lse, q, k, v, **options):
    """out and, unless it is None, lse are the reference's; out is NaN in the rows that no sequence names. Returns the
    limit of out's error."""
    exact, exact_lse = reference.attention(q, k, v, **options)
    rounded, rounded_lse = reference.attention(q, k, v, **options, dtype=None)
    rows = slice(None)
    if options.get("cu_seqlens_q") is not None:
        rows = slice(int(options["cu_seqlens_q"][-1]))
        assert out[rows.stop :].isnan().all(), "rows past the last sequence were written"
        exact, rounded = exact[rows], rounded[rows]
        exact_lse, rounded_lse = exact_lse[:, rows], rounded_lse[:, rows]
        lse = None if lse is None else lse[:, rows]
    error, limit = largest_difference(out[rows], exact), 2 * largest_difference(rounded, exact) + SLACK
    if 0 < exact.numel() < FEW:
        limit = max(limit, torch.finfo(q.dtype).eps * exact.abs().max().item() + SLACK)
    assert error <= limit, f"out is off by {error}, at most {limit} is allowed"
    if lse is None:
        return limit
    out_limit = limit
    error, limit = largest_difference(lse, exact_lse), 2 * largest_difference(rounded_lse, exact_lse) + LSE_SLACK
    assert error <= limit, f"lse is off by {error}, at most {limit} is allowed"
    return out_limit


def variant_name(problem: AttentionProblem) -> str:
    """What differs from the default."""
    shape = ("dtype", "head_dim", "head_dim_v", "mask", "tma_strides", "aux")
    on = [] if problem.tma_strides else ["repeated"]
    for field in fields(problem):
        value = getattr(problem, field.name)
        if isinstance(value, Mod):
            value = f"{value.function.__qualname__.split('.')[0]}_{value.width}"
        elif isinstance(value, tuple):
            value = "x".join(map(str, value))
        if value and field.name not in shape:
            on.append(field.name if value is True else f"{field.name}_{value}")
    return "-".join([problem.dtype, f"{problem.head_dim}x{problem.head_dim_v}", problem.mask, *on])
