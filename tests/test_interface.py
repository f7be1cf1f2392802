"""What the public functions hand to a kernel, seen through a stand-in; no GPU needed."""

import math
import subprocess
import sys

import pytest
import torch

import flash_attn_sm120
from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func
from flash_attn_sm120.checks import UNBOUNDED
from flash_attn_sm120.problem import AttentionProblem

BF16 = torch.bfloat16


def make(batch=2, seqlen_q=19, seqlen_k=21, heads=4, heads_kv=2, head_dim=64, head_dim_v=64, dtype=BF16):
    shapes = [(batch, seqlen_q, heads, head_dim), (batch, seqlen_k, heads_kv, head_dim)]
    shapes.append((batch, seqlen_k, heads_kv, head_dim_v))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def test_defaults(recorder):
    q, k, v = make(head_dim_v=32)
    out = flash_attn_func(q, k, v)
    assert recorder.problems == [AttentionProblem("bfloat16", 64, 32)]
    (call,) = recorder.calls
    assert call[0] is q and call[1] is k and call[2] is v and call[3] is out
    assert call.lse is None and set(call.lengths) == set(call.modifiers) == {None}
    assert call.numbers[:4] == (1 / math.sqrt(64), 0.0, UNBOUNDED, UNBOUNDED)
    assert out.shape == (2, 19, 4, 32) and out.dtype == BF16 and out.is_contiguous()


def test_packed(recorder):
    q, k, v = torch.randn(29, 4, 64).half(), torch.randn(11, 1, 64).half(), torch.randn(11, 1, 64).half()
    cu_q, cu_k = (torch.tensor([0, 3, n], dtype=torch.int32) for n in (29, 11))
    used = torch.tensor([1, 2], dtype=torch.int32)
    out, lse = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 26, 8, seqused_k=used, softcap=3, return_lse=True)
    features = {"softcap": True, "lse": True, "packed_q": True, "packed_k": True, "seqused_k": True}
    assert recorder.problems == [AttentionProblem("float16", 64, 64, **features)]
    (call,) = recorder.calls
    assert call.lse is lse and call.lengths.cu_seqlens_q is cu_q and call.lengths.cu_seqlens_k is cu_k
    assert call.lengths.seqused_q is None and call.lengths.seqused_k is used
    assert call.numbers.softcap == 3.0
    assert out.shape == (29, 4, 64) and lse.shape == (4, 29) and lse.dtype == torch.float32


@pytest.mark.parametrize("packed_q", [False, True])
def test_one_side_packed(packed_q, recorder):
    q, k, v = make()
    cu = torch.tensor([0, 4, 19], dtype=torch.int32)
    if packed_q:
        out, lse = flash_attn_varlen_func(q[0], k, v, cu, return_lse=True)
        assert out.shape == (19, 4, 64) and lse.shape == (4, 19)
    else:
        out, lse = flash_attn_varlen_func(q, k[0], v[0], None, cu, return_lse=True)
        assert out.shape == (2, 19, 4, 64) and lse.shape == (2, 4, 19)
    (problem,) = recorder.problems
    assert (problem.packed_q, problem.packed_k) == (packed_q, not packed_q)


MASKS = [
    ({}, "full", UNBOUNDED, UNBOUNDED),
    ({"window_size": (None, None)}, "full", UNBOUNDED, UNBOUNDED),
    ({"window_size": [-1, None]}, "full", UNBOUNDED, UNBOUNDED),
    ({"window_size": None}, "full", UNBOUNDED, UNBOUNDED),
    ({"causal": True}, "causal", UNBOUNDED, 0),
    ({"window_size": (-1, 0)}, "causal", UNBOUNDED, 0),
    ({"causal": True, "window_size": (-1, 5)}, "causal", UNBOUNDED, 0),
    ({"causal": True, "window_size": (7, -1)}, "local", 7, 0),
    ({"window_size": (7, 0)}, "local", 7, 0),
    ({"window_size": (0, 3)}, "local", 0, 3),
    ({"window_size": (-1, 3)}, "local", UNBOUNDED, 3),
    ({"window_size": (3, -1)}, "local", 3, UNBOUNDED),
    ({"window_size": (2**40, 3)}, "local", UNBOUNDED, 3),
]


@pytest.mark.parametrize("options, mask, left, right", MASKS)
def test_masks(options, mask, left, right, recorder):
    flash_attn_func(*make(), **options)
    assert recorder.problems[0].mask == mask
    assert recorder.calls[0].numbers[2:4] == (left, right)


def test_out_is_written_in_place(recorder):
    q, k, v = make()
    out = torch.full_like(q, math.nan)
    assert flash_attn_func(q, k, v, out=out) is out
    assert recorder.calls[0][3] is out
    assert flash_attn_func(q, k, v, out=out, return_lse=True)[0] is out
    assert (out == 1).all()


def test_strides_that_kernels_read_are_not_copied(recorder):
    q, k, v = make(seqlen_q=21, heads=2)
    fused = torch.stack((q, k, v), dim=2)
    heads_first = torch.randn(2, 2, 11, 64, dtype=BF16).transpose(1, 2)
    for inputs in (fused.unbind(2), [heads_first] * 3, [k.expand(2, -1, -1, -1)[:1].expand(3, -1, -1, -1)] * 3):
        recorder.calls.clear()
        flash_attn_func(*inputs)
        for given, taken in zip(inputs, recorder.calls[0], strict=False):
            assert taken is given


def odd_tensors():
    wide = torch.randn(2, 19, 4, 65, dtype=BF16)
    flat = torch.randn(2 * 19 * 4 * 64 + 8, dtype=BF16)
    return {
        "row stride": wide[..., :64],
        "address": flat[1 : 1 + 2 * 19 * 4 * 64].view(2, 19, 4, 64),
        "both": wide[..., 1:],
    }


@pytest.mark.parametrize("case", odd_tensors())
def test_other_strides_are_copied(case, recorder):
    odd = odd_tensors()[case]
    flash_attn_func(odd, odd, odd)
    for taken in recorder.calls[0][:3]:
        assert taken.data_ptr() != odd.data_ptr() and taken.data_ptr() % 16 == 0
        assert not any(stride % 8 for stride in taken.stride()[:-1])
        assert torch.equal(taken, odd)


def test_stride_of_a_single_element_dimension_needs_no_copy(recorder):
    q, k, v = make(batch=1, heads=1, heads_kv=1)
    odd = q.as_strided(q.shape, (7, 64, 3, 1))
    flash_attn_func(odd, k, v)
    taken = recorder.calls[0][0]
    assert taken.data_ptr() == q.data_ptr() and torch.equal(taken, q)
    assert not any(stride % 8 for stride in taken.stride()[:-1])


@pytest.mark.parametrize("case", odd_tensors())
def test_out_of_other_strides_is_filled_all_the_same(case, recorder):
    q, k, v = make()
    out = odd_tensors()[case]
    frame = out._base
    frame_before = frame.clone()
    assert flash_attn_func(q, k, v, out=out) is out
    assert recorder.calls[0][3] is not out
    assert (out == 1).all()
    assert (frame != frame_before).sum() <= out.numel()


@pytest.mark.parametrize("which", range(3))
def test_out_over_an_input(which, recorder):
    inputs = make(seqlen_q=21, heads=2)
    out = inputs[which]
    assert flash_attn_func(*inputs, out=out) is out
    assert recorder.calls[0][3].data_ptr() != out.data_ptr()
    assert (out == 1).all()


def test_gradients_off(recorder):
    q, k, v = make()
    q.requires_grad_()
    with torch.no_grad():
        out = flash_attn_func(q, k, v)
    assert not out.requires_grad and not recorder.calls[0][0].requires_grad


@pytest.mark.parametrize("batch, seqlen_q", [(0, 9), (2, 0)])
def test_nothing_to_write_is_not_launched(batch, seqlen_q, recorder):
    out, lse = flash_attn_func(*make(batch=batch, seqlen_q=seqlen_q), return_lse=True)
    assert out.shape == (batch, seqlen_q, 4, 64) and lse.shape == (batch, 4, seqlen_q)
    packed = torch.zeros(0, 4, 64, dtype=BF16)
    marks = torch.zeros(batch + 1, dtype=torch.int32)
    out, lse = flash_attn_varlen_func(packed, packed, packed, marks, marks, return_lse=True)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)
    assert not recorder.calls


def test_no_columns_is_launched(recorder):
    flash_attn_func(*make(seqlen_k=0))
    assert len(recorder.calls) == 1


def test_import_is_light():
    code = "import sys, flash_attn_sm120; sys.exit(int('torch' in sys.modules or 'cutlass' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = "import sys; from flash_attn_sm120 import flash_attn_func; sys.exit(int('cutlass' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names():
    for name in flash_attn_sm120.__all__:
        assert getattr(flash_attn_sm120, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'flash_attn'"):
        _ = flash_attn_sm120.flash_attn


def test_a_repeated_dimension_never_meets_a_tensor_map(recorder):
    """Also where the batch of one has an odd stride, which the interface mends without a copy."""
    q = torch.randn(1, 26, 4, 64).bfloat16()
    k = torch.randn(26, 1, 64).bfloat16().expand(26, 4, 64).as_strided((1, 26, 4, 64), (3, 64, 0, 1))
    flash_attn_func(q, k, k)
    assert recorder.calls[0][1].stride(2) == 0
    assert not recorder.problems[0].tma_strides
