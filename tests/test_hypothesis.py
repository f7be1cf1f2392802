"""Shapes, strides, lengths, ratios, windows and softcap at random. FLASH_ATTN_SM120_EXAMPLES says how many."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from oracle import assert_right, ints, marks

# Each pair is a compilation for each mask and form, so they are few.
HEAD_DIMS = [(64, 64), (128, 128), (96, 96), (192, 128), (256, 256), (80, 80), (40, 72), (8, 16)]
RATIOS = [1, 2, 3, 4, 7, 8, 12, 28]
FORMS = ["dense", "packed", "padded", "packed q", "packed k", "packed with seqused"]
MASKS = ["full", "causal", "local"]
LAYOUTS = ["plain", "heads first", "gaps", "odd gaps", "odd address"]
EXAMPLES = int(os.environ.get("FLASH_ATTN_SM120_EXAMPLES", "20"))


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (..., rows, heads, d) in other strides; what lies between them is NaN."""
    *outer, rows, heads, d = values.shape

    def gapped(gap, shift=0):
        frame = torch.full((*outer, rows, heads, d + gap), float("nan"), dtype=values.dtype, device=values.device)
        frame[..., shift : shift + d] = values
        return frame[..., shift : shift + d]

    if layout == "heads first":
        return values.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "gaps":
        return gapped(16, 8)
    if layout == "odd gaps":
        return gapped(3)
    if layout == "odd address":
        return gapped(8, 1)
    return values


@st.composite
def calls(draw, longest, most_heads):
    """Everything about a call but the numbers in it."""
    head_dims = draw(st.sampled_from(HEAD_DIMS))
    ratio = draw(st.sampled_from([ratio for ratio in RATIOS if ratio <= most_heads]))
    batch = draw(st.integers(1, 4))
    length = st.one_of(st.sampled_from([0, 1, 16, 63, 64, 65]), st.integers(0, longest))
    lengths = st.lists(length.map(lambda n: min(n, longest)), min_size=batch, max_size=batch)
    side = st.one_of(st.none(), st.integers(0, longest))
    return {
        "dtype": draw(st.sampled_from([torch.bfloat16, torch.float16])),
        "head_dims": head_dims,
        "heads_kv": draw(st.integers(1, max(1, min(3, most_heads // ratio)))),
        "ratio": ratio,
        "lengths_q": draw(lengths),
        "lengths_k": draw(lengths),
        "form": draw(st.sampled_from(FORMS)),
        "mask": draw(st.sampled_from(MASKS)),
        "window": (draw(side), draw(side)),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.5, 30.0])) if head_dims in HEAD_DIMS[:2] else 0.0,
        "scale": draw(st.sampled_from([None, 0.05, 0.3])),
        "layouts": draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 4)),
        "spare_rows": draw(st.integers(0, 9)),
        "seed": draw(st.integers(0, 2**31)),
    }


def run(call, device):
    torch.manual_seed(call["seed"])
    form, lengths_q, lengths_k = call["form"], call["lengths_q"], call["lengths_k"]
    heads_kv = call["heads_kv"]
    heads = heads_kv * call["ratio"]
    batch, spare = len(lengths_q), call["spare_rows"]
    options = {"softcap": call["softcap"], "softmax_scale": call["scale"]}
    if call["mask"] == "causal":
        options["causal"] = True
    elif call["mask"] == "local":
        options["window_size"] = call["window"]

    def shape(lengths, packed):
        if packed:
            return (sum(lengths) + spare,)
        return (batch, max(lengths) + (spare if form != "dense" else 0))

    packed_q = form in ("packed", "packed q", "packed with seqused")
    packed_k = form in ("packed", "packed k", "packed with seqused")
    if packed_q:
        options["cu_seqlens_q"] = marks(device, *lengths_q)
    if packed_k:
        options["cu_seqlens_k"] = marks(device, *lengths_k)
    if form in ("padded", "packed q"):
        options["seqused_k"] = ints(device, *lengths_k)
    if form in ("padded", "packed k"):
        options["seqused_q"] = ints(device, *lengths_q)
    if form == "packed with seqused":
        options["seqused_q"] = ints(device, *(n // 2 for n in lengths_q))
        options["seqused_k"] = ints(device, *(n - n // 3 for n in lengths_k))
    rows_q, rows_k = shape(lengths_q, packed_q), shape(lengths_k, packed_k)
    head_dim, head_dim_v = call["head_dims"]
    shapes = [(*rows_q, heads, head_dim), (*rows_k, heads_kv, head_dim), (*rows_k, heads_kv, head_dim_v)]
    shapes.append((*rows_q, heads, head_dim_v))
    tensors = [torch.randn(s, device=device, dtype=call["dtype"]) for s in shapes]
    q, k, v, out = (lay_out(x, layout) for x, layout in zip(tensors, call["layouts"], strict=True))
    assert_right(q, k, v, out=out, **options)


def test_random_calls(device):
    longest, most_heads = device.pick((700, 84), (90, 12))

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(calls(longest, most_heads))
    def body(call):
        note(str(call))
        run(call, device.torch_device)

    body()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values(layout):
    values = torch.randn(2, 5, 3, 16)
    laid = lay_out(values, layout)
    assert torch.equal(laid, values) and laid.stride(-1) == 1
    assert (laid.stride() == values.stride()) == (layout == "plain")


def test_a_wrong_kernel_is_found(recorder):
    """The stand-in writes ones everywhere; the very first call with a column to see must complain."""
    call = {
        "dtype": torch.bfloat16, "head_dims": (64, 64), "heads_kv": 1, "ratio": 7, "lengths_q": [5, 3],
        "lengths_k": [9, 4], "form": "dense", "mask": "causal", "window": (None, None), "softcap": 0.0, "scale": None,
        "layouts": ("plain", "gaps", "odd gaps", "odd address"), "spare_rows": 0, "seed": 1,
    }  # fmt: skip
    with pytest.raises(AssertionError, match="out is off by"):
        run(call, "cpu")
    for form in FORMS[1:]:
        with pytest.raises(AssertionError, match=r"out is off by|were written"):
            run({**call, "form": form, "spare_rows": 2}, "cpu")
