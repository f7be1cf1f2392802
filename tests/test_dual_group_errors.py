"""Wrong calls with two query groups raise before any launch and name the argument; what right ones launch."""

import math

import pytest
import torch
from oracle import ints, marks
from test_host import Operations, no_kernel  # noqa: F401  a fixture

from flash_attn_sm120 import dual_group, grouped_attention
from flash_attn_sm120 import fused_zigzag_llama3_flash_attn_varlen_forward as fused
from flash_attn_sm120 import replace_execute_grouped_attention_with_fused_varlen as replace_grouped

BF16, N = torch.bfloat16, NotImplementedError


def t(*shape, dtype=BF16, **options):
    return torch.zeros(shape, dtype=dtype, **options)


def arguments(**changes):
    """Of a right call, but for `changes` (and the CPU)."""
    return {
        "q0": t(9, 4, 64), "q1": t(6, 4, 64), "k": t(20, 2, 64), "v": t(20, 2, 64),
        "cu_seqlens_q0": ints("cpu", 0, 4, 9), "cu_seqlens_q1": ints("cpu", 0, 6, 6),
        "cu_seqlens_k": ints("cpu", 0, 5, 20), "max_seqlen_q0": 5, "max_seqlen_q1": 6, "max_seqlen_k": 15,
        "max_kv_len_q0": 3, "max_kv_len_q1": 15, **changes,
    }  # fmt: skip


WRONG = [
    ({"q0": [1]}, TypeError, "q0", ["torch.Tensor", "list"]),
    ({"q1": t(6, 4, 64, dtype=torch.float32)}, TypeError, "q1", ["bfloat16 or float16", "float32"]),
    ({"q1": t(6, 4, 64, dtype=torch.float16)}, TypeError, "k", ["float16 as q1"]),
    ({"q1": t(6, 2, 64)}, ValueError, "q1", ["4 heads as q0"]),
    ({"q1": t(6, 4, 72)}, ValueError, "k", ["head_dim 72 as q1"]),
    ({"q0": t(2, 9, 4, 64)}, ValueError, "cu_seqlens_q0", ["None", "four dimensions"]),
    ({"q0": t(9, 4, 12)}, ValueError, "q0", ["multiple of 8"]),
    ({"q0": t(9, 3, 64)}, ValueError, "k", ["divides q0's 3 heads"]),
    ({"q1": t(6, 4, 128)[..., ::2]}, ValueError, "q1", ["stride 1"]),
    ({"v": t(19, 2, 64)}, ValueError, "v", ["to go with k"]),
    ({"k": t(20, 2, 64, dtype=torch.float8_e4m3fn), "v": t(20, 2, 64, dtype=torch.float8_e4m3fn)}, N, "k", ["float8"]),
    ({"cu_seqlens_q0": None}, ValueError, "cu_seqlens_q0", ["int32", "None"]),
    ({"cu_seqlens_k": None}, ValueError, "cu_seqlens_k", ["int32", "None"]),
    ({"cu_seqlens_q1": ints("cpu", 0, 6)}, ValueError, "cu_seqlens_k", ["batch of 1 as cu_seqlens_q1", "2"]),
    ({"cu_seqlens_q1": ints("cpu", 0, 6, 6).long()}, TypeError, "cu_seqlens_q1", ["int32"]),
    ({"max_seqlen_q0": 2.5}, TypeError, "max_seqlen_q0", ["int or None"]),
    ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k", [">= 0"]),
    ({"max_seqlen_q1": None, "padded_lse": True}, ValueError, "max_seqlen_q1", ["padded_lse"]),
    ({"max_kv_len_q0": None}, TypeError, "max_kv_len_q0", ["int >= 0"]),
    ({"max_kv_len_q1": -3}, ValueError, "max_kv_len_q1", ["-3"]),
    ({"max_kv_len_q1": True}, TypeError, "max_kv_len_q1", ["bool"]),
    ({"max_kv_len_q1": ints("cpu", 1, 2, 3)}, ValueError, "max_kv_len_q1", ["batch of 2"]),
    ({"max_kv_len_q0": torch.tensor([1, 2])}, TypeError, "max_kv_len_q0", ["int64"]),
    ({"softmax_scale": 0.0}, ValueError, "softmax_scale", ["> 0"]),
    ({"causal": 1}, TypeError, "causal", ["bool"]),
    ({"window_size": (3,)}, ValueError, "window_size", ["(left, right)"]),
    ({"softcap": -1.0}, ValueError, "softcap", ["> 0"]),
    ({"learnable_sink": t(3, dtype=torch.float32)}, ValueError, "learnable_sink", ["4"]),
    ({"dropout_p": 0.1}, N, "dropout_p", ["0 for two query groups", "0.1"]),
    ({"padded_lse": 1}, TypeError, "padded_lse", ["bool"]),
    ({"out1": t(9, 4, 64)}, ValueError, "out1", ["(6, 4, 64)"]),
    ({"q1": t(6, 4, 64, requires_grad=True)}, N, "q1", ["forward only"]),
    ({}, ValueError, "k", ["CUDA device"]),
]


def assert_refused(call, kind, name, words):
    with pytest.raises(kind) as raised:
        call()
    text = str(raised.value)
    assert text.startswith(f"{name}: expected ") and all(word in text for word in words), text


@pytest.mark.parametrize("changes, kind, name, words", WRONG, ids=lambda x: str(x)[:40])
def test_wrong_calls(changes, kind, name, words):
    assert_refused(lambda: fused(**arguments(**changes)), kind, name, words)


def test_values_are_checked_when_asked(monkeypatch, recorder):
    monkeypatch.setattr(dual_group.checks, "VALUE_CHECKS", True)
    fused(**arguments())
    for name, wrong in (("cu_seqlens_q1", (0, 7, 6)), ("cu_seqlens_q0", (0, 4, 10)), ("cu_seqlens_k", (1, 5, 20))):
        assert_refused(lambda name=name, wrong=wrong: fused(**arguments(**{name: ints("cpu", *wrong)})), ValueError,
                       name, [])  # fmt: skip
    assert_refused(lambda: fused(**arguments(max_seqlen_q1=5)), ValueError, "max_seqlen_q1", ["at least 6"])


def test_what_is_launched(recorder):
    given = arguments(window_size=(7, None), softcap=2.0, learnable_sink=t(4), max_kv_len_q1=2**40)
    out0, out1, lse0, lse1 = fused(**given)
    (problem,), (call,) = recorder.problems, recorder.calls
    assert problem.dual_group and problem.mask == "local" and problem.softcap and problem.sink == "bfloat16"
    assert (out0.shape, out1.shape, lse0.shape, lse1.shape) == ((9, 4, 64), (6, 4, 64), (4, 9), (4, 6))
    assert call.lengths.max_kv_len_q0 == 3 and call.lengths.max_kv_len_q1 == 2**30
    assert call.numbers.window_left == 7 and call.numbers.window_right == 0 and call.q1 is given["q1"]

    *_, lse0, lse1 = fused(**arguments(padded_lse=True, max_kv_len_q0=ints("cpu", 1, 2), max_seqlen_q0=130))
    assert recorder.problems[-1].padded_lse and recorder.problems[-1].seqused_k
    assert recorder.calls[-1].lengths.max_kv_len_q1.tolist() == [15, 15]
    assert (lse0.shape, lse1.shape) == ((8, 256), (8, 128)) and (lse0 == -math.inf).all()

    odd = t(9, 4, 67)[..., :64]
    out = t(6, 4, 67)[..., :64]
    _, result, *_ = fused(**arguments(q0=odd, out1=out))
    assert recorder.calls[-1].q0.is_contiguous() and result is out and (out == 1).all()
    assert len(recorder.problems) == 3

    fused(**arguments(q0=t(0, 4, 64), q1=t(0, 4, 64)))
    assert len(recorder.calls) == 3


def test_a_steady_call_allocates_its_results_only(no_kernel):  # noqa: F811
    given = arguments()
    for extra, allocations in (({}, 4), ({"out0": t(9, 4, 64), "out1": t(6, 4, 64)}, 2)):
        fused(**given, **extra)
        with Operations() as operations:
            fused(**given, **extra)
        assert len(operations.names) == allocations and all("empty" in name for name in operations.names)


def grouped(**changes):
    """The drop-in's arguments, of rank 1 of 2: sequences of 8 and 0 and 16 keys."""
    first, second = torch.tensor([0, 1, 4, 5, 6, 7]), torch.tensor([2, 3, 8, 9, 10, 11])
    slices = [([(0, 4), (8, 16)], marks("cpu", 4, 0, 8)), ([(0, 6), (8, 20)], marks("cpu", 6, 0, 12))]
    return {
        "chunk_q_list": [t(6, 4, 64), t(6, 4, 64)], "chunk_cu_seqlens_q_list": [marks("cpu", 2, 0, 4)] * 2,
        "chunk_indices_list": [first, second], "kv_buffer": t(2, 24, 2, 64), "kv_slices": slices, "nheads": 4,
        "head_dim": 64, "softmax_scale": None, "dropout_p": 0.0, "causal": True, "window_size": (-1, -1),
        "alibi_slopes": None, "deterministic": True, "world_size": 2, "cu_seqlens_k": marks("cpu", 4, 0, 8),
        "chunk_idx_0": 1, "chunk_idx_1": 2, **changes,
    }  # fmt: skip


WRONG_GROUPED = [
    ({"chunk_q_list": t(6, 4, 64)}, TypeError, "chunk_q_list", ["a list"]),
    ({"chunk_q_list": [t(6, 4, 64)] * 3}, N, "chunk_q_list", ["two groups", "3"]),
    ({"kv_slices": [(), ()]}, TypeError, "kv_slices", ["(ranges, cu_seqlens)"]),
    ({"dropout_p": 0.5}, N, "dropout_p", ["0.5"]),
    ({"alibi_slopes": t(4)}, N, "alibi_slopes", ["None"]),
    ({"deterministic": None}, TypeError, "deterministic", ["bool"]),
    ({"world_size": 0}, ValueError, "world_size", [">= 1"]),
    ({"chunk_idx_0": 2}, ValueError, "chunk_idx_0", ["from 0 to 1", "got 2"]),
    ({"chunk_idx_1": 1}, ValueError, "chunk_idx_1", ["from 2 to 3", "got 1"]),
    ({"chunk_idx_1": 3}, ValueError, "kv_slices[1]", ["(0, 8), (8, 24)"]),
    ({"nheads": 8}, ValueError, "chunk_q_list[0]", ["nheads 8"]),
    ({"chunk_indices_list": [torch.arange(6), torch.arange(5)]}, ValueError, "chunk_indices_list[1]", ["(6,)"]),
    ({"kv_buffer": t(24, 2, 64)}, ValueError, "kv_buffer", ["(2, total_k"]),
    ({"kv_buffer": t(2, 25, 2, 64)}, ValueError, "kv_buffer", ["each of 2 ranks"]),
    ({"kv_buffer": t(2, 26, 2, 64)}, ValueError, "kv_slices", ["whole chunks"]),
    ({"cu_seqlens_k": marks("cpu", 4).long()}, TypeError, "cu_seqlens_k", ["int32"]),
    ({"causal": None}, TypeError, "causal", ["bool"]),
    ({}, ValueError, "k", ["CUDA device"]),
]


@pytest.mark.parametrize("changes, kind, name, words", WRONG_GROUPED, ids=lambda x: str(x)[:40])
def test_wrong_grouped_calls(changes, kind, name, words):
    assert_refused(lambda: replace_grouped(**grouped(**changes)), kind, name, words)


def test_keys_in_the_order_of_positions():
    """Rank r's rows are chunks r and 5 - r of sequences of 18 and 6 keys."""
    numbers = torch.tensor([0, 1, 2, 15, 16, 17, 18, 23, 3, 4, 5, 12, 13, 14, 19, 22, 6, 7, 8, 9, 10, 11, 20, 21])
    ordered = grouped_attention.in_order_of_positions(numbers.expand(2, -1)[..., None, None], [(0, 18), (18, 6)], 3)
    assert torch.equal(ordered[..., 0, 0], torch.arange(24).expand(2, -1))


def test_ranges_of_the_grouped_call(recorder):
    replace_grouped(**grouped())
    lengths = recorder.calls[-1].lengths
    assert lengths.max_kv_len_q0.tolist() == [4, 0, 8] and lengths.max_kv_len_q1.tolist() == [6, 0, 12]
    assert lengths.cu_seqlens_k.tolist() == [0, 8, 8, 24] and lengths.max_kv_len_q0.dtype == torch.int32
