"""The combine kernel: parts of random sequences against the same sum in float64; empty parts hold NaN."""

import functools
import math

import pytest
import torch

pytest.importorskip("cutlass")
from flash_attn_sm120.arguments import CombineArguments
from flash_attn_sm120.compile import build
from flash_attn_sm120.loader import load
from flash_attn_sm120.problem import CombineProblem


@functools.lru_cache(maxsize=32)
def kept(problem):
    return build(problem, None, "sm_120a", keep=True)


def launch_on(device, problem, arguments, written):
    if device.torch_device.type == "cuda":
        load(problem, "sm_{}{}a".format(*torch.cuda.get_device_capability()))(*arguments)
        return
    from flash_attn_sm120.simulator import launch

    launch(kept(problem), arguments, names=CombineArguments._fields, outputs={"out": written})


@pytest.mark.parametrize("num_splits", [1, 2, 7, 33, 128])
@pytest.mark.parametrize("head_dim_v", [64, 128, 192, 256, 40])
def test_dense(num_splits, head_dim_v, device):
    run(device, CombineProblem("bfloat16", head_dim_v, lse=True), (2, 3), 2, num_splits)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes(dtype, device):
    run(device, CombineProblem(dtype, 128, lse=True), (1, 2), 3, 5)


def test_without_lse(device):
    run(device, CombineProblem("bfloat16", 128), (1, 2), 3, 5)


def test_packed_rows_past_the_last_sequence_stay(device):
    run(device, CombineProblem("bfloat16", 128, lse=True, packed=True, cu_seqlens=True), (7,), 2, 4, used=5)


def test_heads_last_lse(device):
    """The layout (num_splits, batch, seqlen_q, heads) goes in as a transposed view."""
    run(device, CombineProblem("bfloat16", 128, lse=True), (2, 3), 2, 4, heads_last=True)


def run(device, problem, rows, heads, num_splits, used=None, heads_last=False):
    target = device.torch_device
    partial = torch.randn(num_splits, *rows, heads, problem.head_dim_v, device=target)
    lse_partial = torch.randn(num_splits, *rows, heads, device=target) * 4
    empty = torch.rand_like(lse_partial) < 0.4
    empty[:, ..., 0, 0] = True  # a row without any part
    lse_partial[empty] = -math.inf
    weights = torch.softmax(lse_partial.double(), 0).nan_to_num(0.0)
    expected = (weights[..., None] * partial.double()).sum(0)
    expected_lse = torch.logsumexp(lse_partial.double(), 0).transpose(-1, -2)
    partial[empty] = math.nan
    lses = lse_partial.transpose(-1, -2)
    if not heads_last:
        lses = lses.contiguous()
    out = torch.full(expected.shape, math.nan, dtype=getattr(torch, problem.dtype), device=target)
    lse = torch.full(expected_lse.shape, math.nan, device=target) if problem.lse else None
    marks, rows_used = None, slice(None)
    if problem.packed:
        marks = torch.tensor([0, 2, used], dtype=torch.int32, device=target)
        rows_used = slice(used)
    launch_on(device, problem, (partial, lses, out, lse, marks, None, None), out[rows_used])
    tolerance = 1e-5 + torch.finfo(out.dtype).eps * 4
    assert (out[rows_used].double() - expected[rows_used]).abs().max() <= tolerance
    if problem.packed:
        assert out[used:].isnan().all()
    if lse is not None:
        found, wanted = (lse[:, :used], expected_lse[:, :used]) if problem.packed else (lse, expected_lse)
        assert torch.equal(found == -math.inf, wanted == -math.inf)
        assert (found.double() - wanted).nan_to_num(0.0).abs().max() < 1e-5
