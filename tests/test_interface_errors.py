"""Wrong calls raise before any launch, and the message names the argument, what is taken and what came.

None of this needs a GPU: the device is the last thing that is checked.
"""

import pytest
import torch

from flash_attn_sm120 import checks, flash_attn_func, flash_attn_varlen_func

BF16 = torch.bfloat16


def t(*shape, dtype=BF16, **options):
    return torch.zeros(shape, dtype=dtype, **options)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def dense(**changes):
    """A right call, but for `changes` (and the CPU)."""
    arguments = {"q": t(2, 9, 4, 64), "k": t(2, 11, 2, 64), "v": t(2, 11, 2, 64), **changes}
    return flash_attn_func(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def packed(**changes):
    arguments = {
        "q": t(9, 4, 64), "k": t(11, 2, 64), "v": t(11, 2, 64),
        "cu_seqlens_q": ints(0, 4, 9), "cu_seqlens_k": ints(0, 5, 11), "max_seqlen_q": 5, "max_seqlen_k": 6,
        **changes,
    }  # fmt: skip
    return flash_attn_varlen_func(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


# (name, call, changes, exception, argument named, what the rest of the message must hold)
WRONG = [
    ("list for q", dense, {"q": [[1.0]]}, TypeError, "q", ["torch.Tensor", "list"]),
    ("None for v", dense, {"v": None}, TypeError, "v", ["torch.Tensor", "None"]),
    ("float32 q", dense, {"q": t(2, 9, 4, 64, dtype=torch.float32)}, TypeError, "q", ["bfloat16 or", "float32"]),
    ("int8 q", dense, {"q": t(2, 9, 4, 64, dtype=torch.int8)}, TypeError, "q", ["bfloat16 or float16", "int8"]),
    ("mixed dtypes", dense, {"k": t(2, 11, 2, 64, dtype=torch.float16)}, TypeError, "k", ["bfloat16", "float16"]),
    ("mixed v dtype", dense, {"v": t(2, 11, 2, 64, dtype=torch.float16)}, TypeError, "v", ["bfloat16", "float16"]),
    ("mixed devices", dense, {"k": t(2, 11, 2, 64, device="meta")}, ValueError, "k", ["cpu", "meta"]),
    ("rank 2", dense, {"q": t(9, 64)}, ValueError, "q", ["batch, seqlen_q, heads, head_dim", "(9, 64)"]),
    ("rank 3 to dense", dense, {"q": t(9, 4, 64)}, ValueError, "q", ["flash_attn_varlen_func", "(9, 4, 64)"]),
    ("rank 5", dense, {"k": t(2, 11, 2, 64, 1)}, ValueError, "k", ["seqlen_k", "(2, 11, 2, 64, 1)"]),
    ("batch of k", dense, {"k": t(3, 11, 2, 64), "v": t(3, 11, 2, 64)}, ValueError, "k", ["batch of 2", "got 3"]),
    ("v shorter than k", dense, {"v": t(2, 10, 2, 64)}, ValueError, "v", ["(2, 11, 2", "(2, 10, 2, 64)"]),
    ("v's heads", dense, {"v": t(2, 11, 4, 64)}, ValueError, "v", ["(2, 11, 2", "(2, 11, 4, 64)"]),
    ("head ratio", dense, {"k": t(2, 11, 3, 64), "v": t(2, 11, 3, 64)}, ValueError, "k", ["4 heads", "got 3"]),
    ("more KV heads", dense, {"k": t(2, 11, 8, 64), "v": t(2, 11, 8, 64)}, ValueError, "k", ["4 heads", "got 8"]),
    ("no KV heads", dense, {"k": t(2, 11, 0, 64), "v": t(2, 11, 0, 64)}, ValueError, "k", ["heads_kv", "got 0"]),
    ("no heads", dense, {"q": t(2, 9, 0, 64)}, ValueError, "q", ["at least one head"]),
    ("head_dim 68", dense, {"q": t(2, 9, 4, 68)}, ValueError, "q", ["multiple of 8", "got 68"]),
    ("head_dim 264", dense, {"q": t(2, 9, 4, 264)}, ValueError, "q", ["to 256", "got 264"]),
    ("head_dim 0", dense, {"q": t(2, 9, 4, 0)}, ValueError, "q", ["from 8", "got 0"]),
    ("head_dim of k", dense, {"k": t(2, 11, 2, 128)}, ValueError, "k", ["head_dim 64", "got 128"]),
    ("head_dim_v 4", dense, {"v": t(2, 11, 2, 4)}, ValueError, "v", ["head_dim_v", "got 4"]),
    ("last stride of q", dense, {"q": t(2, 9, 4, 128)[..., ::2]}, ValueError, "q", ["stride 1", "2)"]),
    ("last stride of v", dense, {"v": t(2, 11, 64, 2).mT}, ValueError, "v", ["stride 1", "strides"]),
    ("scale 0", dense, {"softmax_scale": 0.0}, ValueError, "softmax_scale", ["> 0", "0.0"]),
    ("scale -1", dense, {"softmax_scale": -1}, ValueError, "softmax_scale", ["> 0", "-1"]),
    ("scale nan", dense, {"softmax_scale": float("nan")}, ValueError, "softmax_scale", ["finite", "nan"]),
    ("scale inf", dense, {"softmax_scale": float("inf")}, ValueError, "softmax_scale", ["finite", "inf"]),
    ("scale past float32", dense, {"softmax_scale": 1e39}, ValueError, "softmax_scale", ["finite", "1e+39"]),
    ("scale text", dense, {"softmax_scale": "1"}, TypeError, "softmax_scale", ["number", "str"]),
    ("scale tensor", dense, {"softmax_scale": torch.tensor(1.0)}, TypeError, "softmax_scale", ["number", "float32"]),
    ("softcap -1", dense, {"softcap": -1.0}, ValueError, "softcap", ["> 0", "-1.0"]),
    ("softcap nan", dense, {"softcap": float("nan")}, ValueError, "softcap", ["finite", "nan"]),
    ("softcap under float32", dense, {"softcap": 1e-46}, ValueError, "softcap", ["> 0", "1e-46"]),
    ("causal text", dense, {"causal": "no"}, TypeError, "causal", ["bool", "str"]),
    ("causal int", dense, {"causal": 1}, TypeError, "causal", ["bool", "int 1"]),
    ("return_lse text", dense, {"return_lse": "yes"}, TypeError, "return_lse", ["bool", "str"]),
    ("window int", dense, {"window_size": 128}, TypeError, "window_size", ["(left, right)", "int 128"]),
    ("window of three", dense, {"window_size": (1, 2, 3)}, ValueError, "window_size", ["(left, right)", "(1, 2, 3)"]),
    ("window -2", dense, {"window_size": (-2, 0)}, ValueError, "window_size", ["-1 or None", "-2"]),
    ("window floats", dense, {"window_size": (1.5, 0)}, TypeError, "window_size", ["ints or None", "1.5"]),
    ("window bools", dense, {"window_size": (True, 0)}, TypeError, "window_size", ["ints or None", "bool"]),
    ("out shape", dense, {"out": t(2, 9, 4, 32)}, ValueError, "out", ["(2, 9, 4, 64)", "(2, 9, 4, 32)"]),
    ("out dtype", dense, {"out": t(2, 9, 4, 64, dtype=torch.float32)}, TypeError, "out", ["bfloat16", "float32"]),
    ("out device", dense, {"out": t(2, 9, 4, 64, device="meta")}, ValueError, "out", ["cpu", "meta"]),
    ("out last stride", dense, {"out": t(2, 9, 64, 4).mT}, ValueError, "out", ["stride 1", "strides"]),
    ("out expanded", dense, {"out": t(1, 9, 4, 64).expand(2, 9, 4, 64)}, ValueError, "out", ["apart", "(0, "]),
    ("out list", dense, {"out": []}, TypeError, "out", ["torch.Tensor", "list"]),
    ("gradient", dense, {"q": t(2, 9, 4, 64, requires_grad=True)}, NotImplementedError, "q", ["forward only"]),
    ("gradient of v", dense, {"v": t(2, 11, 2, 64, requires_grad=True)}, NotImplementedError, "v", ["forward only"]),
    ("unknown name", dense, {"soft_cap": 3.0}, TypeError, "flash_attn_func()", ["'soft_cap'"]),
    ("a right call on the CPU", dense, {}, ValueError, "q", ["CUDA", "cpu", "flash_attn_sm120.simulator.simulate"]),
    ("an empty call on the CPU", dense, {"q": t(2, 0, 4, 64)}, ValueError, "q", ["CUDA", "cpu"]),
    ("a packed call on the CPU", packed, {}, ValueError, "q", ["CUDA", "cpu"]),
    ("no cu_seqlens_q", packed, {"cu_seqlens_q": None}, ValueError, "cu_seqlens_q", ["(batch + 1,)", "None"]),
    ("no cu_seqlens_k", packed, {"cu_seqlens_k": None}, ValueError, "cu_seqlens_k", ["(batch + 1,)", "None"]),
    ("cu_seqlens with rank 4", packed, {"q": t(2, 9, 4, 64)}, ValueError, "cu_seqlens_q", ["None", "four", "(3,)"]),
    ("cu_seqlens with rank 2", packed, {"q": t(9, 64)}, ValueError, "q", ["packed (total, heads", "(9, 64)"]),
    ("cu_seqlens list", packed, {"cu_seqlens_q": [0, 4, 9]}, TypeError, "cu_seqlens_q", ["int32", "list"]),
    ("cu_seqlens int64", packed, {"cu_seqlens_q": ints(0, 9, dtype=torch.int64)}, TypeError, "cu_seqlens_q", ["int64"]),
    ("cu_seqlens float", packed, {"cu_seqlens_k": torch.zeros(3)}, TypeError, "cu_seqlens_k", ["int32", "float32"]),
    ("cu_seqlens rank 2", packed, {"cu_seqlens_q": ints(0, 4, 9)[None]}, ValueError, "cu_seqlens_q", ["(1, 3)"]),
    ("cu_seqlens empty", packed, {"cu_seqlens_q": ints()}, ValueError, "cu_seqlens_q", ["batch + 1", "(0,)"]),
    ("cu_seqlens strided", packed, {"cu_seqlens_q": ints(0, 9, 4, 9, 9, 9)[::2]}, ValueError, "cu_seqlens_q", ["(2,)"]),
    ("cu_seqlens elsewhere", packed, {"cu_seqlens_q": ints(0, 4, 9).to("meta")}, ValueError, "cu_seqlens_q", ["meta"]),
    ("two batches", packed, {"cu_seqlens_k": ints(0, 11)}, ValueError, "cu_seqlens_k", ["batch of 2", "got 1"]),
    ("seqused size", packed, {"seqused_k": ints(1, 2, 3)}, ValueError, "seqused_k", ["batch of 2", "got 3"]),
    ("seqused int64", packed, {"seqused_q": torch.zeros(2).long()}, TypeError, "seqused_q", ["int32", "int64"]),
    ("seqused tuple", packed, {"seqused_q": (1, 2)}, TypeError, "seqused_q", ["int32", "tuple"]),
    ("max_seqlen negative", packed, {"max_seqlen_q": -1}, ValueError, "max_seqlen_q", [">= 0", "-1"]),
    ("max_seqlen float", packed, {"max_seqlen_k": 6.0}, TypeError, "max_seqlen_k", ["int or None", "float"]),
    ("max_seqlen tensor", packed, {"max_seqlen_k": ints(6)[0]}, TypeError, "max_seqlen_k", ["int or None", "int32"]),
    ("out of packed", packed, {"out": t(11, 4, 64)}, ValueError, "out", ["(9, 4, 64)", "(11, 4, 64)"]),
]  # fmt: skip


@pytest.mark.parametrize("call, changes, kind, argument, parts", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_call(call, changes, kind, argument, parts):
    with pytest.raises(Exception) as caught:
        call(**changes)
    assert type(caught.value) is kind, caught.value
    text = str(caught.value)
    if not argument.endswith("()"):
        argument, parts = f"{argument}: expected ", [*parts, ", got "]
    assert text.startswith(argument), text
    for part in parts:
        assert part in text, text


NOT_YET = {
    "q_descale": t(1), "return_attn_probs": True,
}  # fmt: skip


@pytest.mark.parametrize("call", [dense, packed])
@pytest.mark.parametrize("name", NOT_YET)
def test_later_feature_is_refused_by_name(call, name):
    with pytest.raises(NotImplementedError, match=rf"^{name}: expected .*, got "):
        call(**{name: NOT_YET[name]})


@pytest.mark.parametrize("name", checks.LATER)
def test_later_feature_is_taken_when_off(name, recorder):
    for neutral in checks.LATER[name]:
        dense(**{name: neutral})
    assert len(recorder.calls) == len(checks.LATER[name])
    assert name in NOT_YET


@pytest.mark.parametrize("name", ["deterministic", "pack_gqa"])
def test_options_without_effect(name, recorder):
    for value in (None, False, True):
        dense(**{name: value})
    assert len(recorder.calls) == 3 and len(set(recorder.problems)) == 1
    with pytest.raises(TypeError, match=f"^{name}: expected bool or None, got str"):
        dense(**{name: "yes"})


WRONG_VALUES = [
    ({"cu_seqlens_q": ints(1, 4, 9)}, "cu_seqlens_q", "0 as the first value, got 1"),
    ({"cu_seqlens_q": ints(0, 10, 9)}, "cu_seqlens_q", "never fall, got 10, 9 at index 1"),
    ({"cu_seqlens_k": ints(0, 5, 12)}, "cu_seqlens_k", "at most 11, the rows of k, got 12"),
    ({"cu_seqlens_k": ints(-3, 5, 11)}, "cu_seqlens_k", "first value, got -3"),
    ({"seqused_q": ints(4, 6)}, "seqused_q", "from 0 to 5, the rows of sequence 1, got 6"),
    ({"seqused_k": ints(-1, 6)}, "seqused_k", "from 0 to 5, the rows of sequence 0, got -1"),
    ({"max_seqlen_q": 4}, "max_seqlen_q", "at least 5, the longest sequence, got 4"),
    ({"max_seqlen_k": 2}, "max_seqlen_k", "at least 6, the longest sequence, got 2"),
]


@pytest.mark.parametrize("changes, argument, text", WRONG_VALUES)
def test_wrong_lengths_are_found_on_request(changes, argument, text, monkeypatch, recorder):
    monkeypatch.setattr(checks, "VALUE_CHECKS", True)
    with pytest.raises(ValueError, match=f"^{argument}: expected .*{text}"):
        packed(**changes)
    assert not recorder.calls
    monkeypatch.setattr(checks, "VALUE_CHECKS", False)
    packed(**changes)
    assert len(recorder.calls) == 1


def test_right_lengths_pass_on_request(monkeypatch, recorder):
    monkeypatch.setattr(checks, "VALUE_CHECKS", True)
    packed(seqused_q=ints(0, 5), seqused_k=ints(5, 0))
    packed(q=t(12, 4, 64), max_seqlen_q=None)
    padded = {"cu_seqlens_q": None, "q": t(2, 5, 4, 64)}
    packed(**padded, seqused_q=ints(5, 1))
    with pytest.raises(ValueError, match=r"^seqused_q: expected from 0 to 5, the rows of sequence 1, got 6"):
        packed(**padded, seqused_q=ints(5, 6))
    assert len(recorder.calls) == 3


@pytest.mark.parametrize("capability, target", [((9, 0), "sm_90a"), ((10, 0), "sm_100a")])
def test_other_gpus_run_with_a_warning(capability, target):
    with pytest.warns(UserWarning, match=f"tuned for compute capability 12.x and runs on {capability[0]}."):
        assert checks.target_of(capability) == target


def test_targets(recwarn):
    assert checks.target_of((12, 0)) == "sm_120a"
    assert checks.target_of((12, 1)) == "sm_121a"
    assert not recwarn.list
    with pytest.raises(NotImplementedError, match=r"^device: expected .*9.0 or later, got 8.9"):
        checks.target_of((8, 9))
