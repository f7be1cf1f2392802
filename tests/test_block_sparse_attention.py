"""Attention over listed blocks against the dense reference. FLASH_ATTN_SM120_EXAMPLES says how many at random."""

import math
import os
import warnings

import pytest
import torch

pytest.importorskip("cutlass")
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from oracle import assert_right, ints, rand
from sparse_cases import WILD, random_blocks
from test_dropout import in_form
from test_mods_attention import place_bias
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flash_attn_sm120 import (
    BlockSparseTensors,
    checks,
    flash_attn_func,
    flash_attn_varlen_func,
    mods,
    reference,
)
from flash_attn_sm120.matrix import LSE_SLACK, SLACK, largest_difference

BF16, FP16 = torch.bfloat16, torch.float16
# A block size, a mod and a form are a compilation.
BLOCK_SIZES = [(64, 32), (64, 64), (64, 256), (128, 64), (128, 128), (192, 192), (256, 64), (256, 256)]
FORMS = ["dense", "padded", "packed", "paged"]
MODS = ["dense", "causal", "document", "none"]


@st.composite
def sparse_calls(draw, rows, keys, head_dims):
    batch = draw(st.integers(1, 3))
    ratio, heads_kv = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 1), (2, 2)]))

    def lengths(most):
        length = st.one_of(st.sampled_from([0, 1, 64, 65, 128]), st.integers(1, most))
        return tuple(draw(st.lists(length.map(lambda n: min(n, most)), min_size=batch, max_size=batch)))

    return {
        "dtype": draw(st.sampled_from([BF16, FP16])),
        "head_dim": draw(st.sampled_from(head_dims)),
        "heads": (heads_kv * ratio, heads_kv),
        "lengths": (lengths(rows), lengths(keys)),
        "form": draw(st.sampled_from(FORMS)),
        "block_size": draw(st.sampled_from(BLOCK_SIZES)),
        "density": draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])),
        "mod": draw(st.sampled_from(MODS)),
        "lists_of": draw(st.tuples(st.booleans(), st.booleans())),
        "causal": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def mask_of(mod, batch, heads, seqlen_q, seqlen_k, device):
    """The arguments of a call, and the kinds of blocks that it may list."""
    if mod == "none":
        return {}, ("full",)
    if mod == "causal":
        return {"mask_mod": mods.causal(vec_size=2)}, ("mask", "full")
    if mod == "document":
        ids = torch.arange(seqlen_k, dtype=torch.int32, device=device)[None] // torch.randint(20, 90, (batch, 1)).to(
            device
        )
        chosen = mods.both(mods.causal(), mods.document())
        return {"mask_mod": chosen, "aux_tensors": [ids.int().contiguous()]}, ("mask", "full")
    seen = torch.rand(batch, heads, seqlen_q, seqlen_k, device=device) < 0.6
    return {"mask_mod": mods.dense(vec_size=2), "aux_tensors": [seen]}, ("mask", "full")


def run(call, device):
    torch.manual_seed(call["seed"])
    lengths_q, lengths_k = call["lengths"]
    batch, (heads, heads_kv), d = len(lengths_q), call["heads"], call["head_dim"]
    rows, keys = max(lengths_q), max(lengths_k)
    q = rand(device, batch, rows, heads, d, dtype=call["dtype"])
    k, v = (rand(device, batch, keys, heads_kv, d, dtype=call["dtype"]) for _ in range(2))
    options, kinds = mask_of(call["mod"], batch, heads, rows, keys, device)
    sizes = [size if own else 1 for size, own in zip((batch, heads), call["lists_of"], strict=True)]
    lists = random_blocks(*sizes, rows, keys, call["block_size"], call["density"], kinds, device)
    options |= {"block_sparse_tensors": lists, "causal": call["causal"]}
    q, k, v, lengths = in_form(device, call["form"], q, k, v, lengths_q, lengths_k)
    return assert_right(q, k, v, **options, **lengths)


def test_random_blocks(device):
    rows, keys, head_dims, examples = device.pick((700, 900, (64, 128, 192, 256), 300), (150, 160, (64,), 8))

    @settings(
        max_examples=int(os.environ.get("FLASH_ATTN_SM120_EXAMPLES", examples)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(sparse_calls(rows, keys, head_dims))
    def body(call):
        note(str(call))
        run(call, device.torch_device)

    body()


def inputs(device, lengths=None, heads=(4, 2), dtype=BF16, form="dense", head_dim=64):
    """(q, k, v, options) in a form."""
    lengths_q, lengths_k = lengths or device.pick(((300, 500), (515, 130)), ((70, 130), (140, 45)))
    on, batch = device.torch_device, len(lengths_q)
    q = rand(on, batch, max(lengths_q), heads[0], head_dim, dtype=dtype)
    k, v = (rand(on, batch, max(lengths_k), heads[1], head_dim, dtype=dtype) for _ in range(2))
    return in_form(on, form, q, k, v, lengths_q, lengths_k)


def seen_by(q, k, batch=None):
    return torch.rand(batch or q.shape[0], q.shape[2], q.shape[1], k.shape[1], device=q.device) < 0.5


@pytest.mark.parametrize("form", ["packed", "paged"])
def test_blocks_of_each_sequence(form, device):
    """Counted from its own first row and column; those behind its end are none."""
    lengths = device.pick(((300, 500, 1), (515, 130, 257)), ((70, 130, 1), (40, 140, 65)))
    q, k, v, options = inputs(device, lengths, form=form, heads=(2, 1))
    on, sizes = device.torch_device, (3, 2, max(lengths[0]), max(lengths[1]))
    given = {"mask_mod": mods.dense(), "aux_tensors": [torch.rand(sizes, device=on) < 0.5], **options}
    for density in (0.6, 1.0):
        lists = random_blocks(*sizes, (64, 64), density, device=on)
        assert_right(q, k, v, block_sparse_tensors=lists, **given)


def test_lists_that_serve_all(device):
    q, k, v, _ = inputs(device, heads=(4, 2))
    for batch in (1, 2):
        for heads in (1, 4):
            lists = random_blocks(batch, heads, q.shape[1], k.shape[1], (64, 32), 0.6, device=q.device)
            assert_right(q, k, v, mask_mod=mods.causal(), block_sparse_tensors=lists)


@pytest.mark.parametrize("kinds", [("mask", "full"), ("mask",), ("full",)], ids=str)
def test_without_a_block(kinds, device):
    """Rows without one are 0 and -inf, or the sink."""
    q, k, v, _ = inputs(device, heads=(2, 1))
    lists = random_blocks(2, 1, q.shape[1], k.shape[1], (64, 32), 1.0, kinds, q.device)
    for cnt in (lists.mask_block_cnt, lists.full_block_cnt):
        if cnt is not None:
            cnt[0], cnt[1, :, 1] = 0, 0
    options = {"block_sparse_tensors": lists, "mask_mod": mods.causal()}
    out, lse = assert_right(q, k, v, **options)
    for blank, blank_lse in ((out[0], lse[0]), (out[1, 64:128], lse[1, :, 64:128])):
        assert (blank == 0).all() and (blank_lse == -math.inf).all()
    if len(kinds) == 2:
        sink = torch.tensor([0.5, -1.0], device=q.device)
        out, lse = assert_right(q, k, v, learnable_sink=sink, **options)
        assert (out[0] == 0).all() and torch.equal(lse[0], sink[:, None].expand_as(lse[0]))


def test_unlisted_blocks_are_not_loaded(device):
    """They hold NaN."""
    q, k, v, _ = inputs(device, device.pick(((300,), (600,)), ((70,), (300,))), heads=(2, 1))
    lists = random_blocks(1, 1, q.shape[1], k.shape[1], (64, 64), 1.0, device=q.device)
    keep = torch.arange(k.shape[1], device=q.device) // 64 % 2 == 0
    for cnt, idx in ((lists.mask_block_cnt, lists.mask_block_idx), (lists.full_block_cnt, lists.full_block_idx)):
        for m in range(cnt.shape[2]):
            even = [n for n in idx[0, 0, m, : cnt[0, 0, m]].tolist() if n % 2 == 0]
            cnt[0, 0, m], idx[0, 0, m] = len(even), WILD
            idx[0, 0, m, : len(even)] = torch.tensor(even, dtype=torch.int32)
    holes = [torch.where(keep[:, None, None], x, math.nan) for x in (k, v)]
    assert_right(q, *holes, clean=(k, v), mask_mod=mods.causal(), block_sparse_tensors=lists)


def test_full_blocks_across_the_diagonal(device):
    """A causal call stays causal whatever the lists call full."""
    q, k, v, _ = inputs(device, heads=(2, 1))
    lists = random_blocks(1, 1, q.shape[1], k.shape[1], (64, 64), 1.0, ("full",), q.device)
    out, _ = assert_right(q, k, v, block_sparse_tensors=lists, causal=True)
    exact, _ = reference.attention(q, k, v, causal=True)
    rounded, _ = reference.attention(q, k, v, causal=True, dtype=None)
    assert largest_difference(out, exact) <= 2 * largest_difference(rounded, exact) + SLACK


@pytest.mark.parametrize("form", ["dense", "paged"])
def test_score_mod_and_mask_mod_and_lists_and_gqa(form, device):
    lengths = device.pick(((300, 500), (515, 130)), ((70, 130), (140, 45)))
    q, k, v, options = inputs(device, lengths, heads=(6, 2), form=form, dtype=FP16)
    on, sizes = device.torch_device, (2, 6, max(lengths[0]), max(lengths[1]))
    bias, seen = torch.randn(sizes[1:], device=on).to(BF16), torch.rand(sizes, device=on) < 0.6
    options |= {
        "score_mod": place_bias(2, 0, 0),
        "mask_mod": mods.dense(aux=1, vec_size=4),
        "aux_tensors": [bias, seen],
    }
    assert_right(q, k, v, block_sparse_tensors=random_blocks(*sizes, (128, 128), 0.7, device=on), **options)


def test_dropout_and_lists(device):
    q, k, v, _ = inputs(device)
    lists = random_blocks(2, 4, q.shape[1], k.shape[1], (64, 64), 0.7, device=q.device)
    options = {"block_sparse_tensors": lists, "mask_mod": mods.causal()}
    for p in (0.2, 0.8):
        assert_right(q, k, v, dropout_p=p, dropout_seed=2**63 + 5, **options)


@pytest.mark.parametrize("lengths", [((0, 70), (40, 30)), ((70, 3), (0, 33))])
def test_empty_sequences_read_nothing(lengths, device):
    q, k, v, options = inputs(device, lengths, heads=(2, 1), form="padded")
    lists = random_blocks(2, 2, q.shape[1], k.shape[1], (64, 32), 1.0, ("mask",), q.device)
    options |= {"block_sparse_tensors": lists, "mask_mod": mods.dense(), "aux_tensors": [seen_by(q, k)]}
    assert_right(q, k, v, **options)


FLEX = {
    "causal": (lambda b, h, q, k: q >= k, lambda: mods.causal()),
    "window": (lambda b, h, q, k: (q - k <= 40) & (k <= q), lambda: mods.sliding_window(40, 0)),
}


def right_beside(found, exact, rounded, slack):
    error, limit = largest_difference(found, exact), 2 * largest_difference(rounded, exact) + slack
    assert error <= limit, f"off by {error}, at most {limit} is allowed"


@pytest.mark.parametrize("name", [*FLEX, "document"])
def test_block_masks_of_flex_attention(name, device):
    """The result of flex_attention in float32, which knows the same BlockMask."""
    seqlen = device.pick(700, 150)
    q, k, v, _ = inputs(device, ((seqlen,) * 2, (seqlen,) * 2))
    aux = {}
    if name == "document":
        ids = torch.randint(0, 2, (2, seqlen), dtype=torch.int32, device=q.device).cumsum(1).div(40).int()
        flex, own = lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (q >= k), mods.both(mods.causal(), mods.document())
        aux = {"aux_tensors": [ids]}
    else:
        flex, own = FLEX[name][0], FLEX[name][1]()
    block_mask = create_block_mask(flex, 2, None, seqlen, seqlen, device=str(q.device), BLOCK_SIZE=(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it isn't compiled
        exact, exact_lse = flex_attention(
            *(x.float().transpose(1, 2) for x in (q, k, v)), block_mask=block_mask, enable_gqa=True, return_lse=True
        )
    options = {"block_sparse_tensors": BlockSparseTensors.from_block_mask(block_mask), "mask_mod": own, **aux}
    out, lse = flash_attn_func(q, k, v, return_lse=True, **options)
    rounded, rounded_lse = reference.attention(q, k, v, dtype=None, **options)
    right_beside(out, exact.transpose(1, 2), rounded, SLACK)
    right_beside(lse, exact_lse, rounded_lse, LSE_SLACK)


@pytest.mark.parametrize("form", ["dense", "packed", "paged"])
def test_lists_of_garbage_read_nothing_outside(form, device):
    """Blocks of rows whose lists are in order stay right."""
    lengths = ((192, 150), (140, 60))
    q, k, v, options = inputs(device, lengths, heads=(2, 1), form=form)
    on = device.torch_device
    lists = random_blocks(2, 2, 192, 150, (64, 32), 0.6, device=on)
    wild = torch.tensor([WILD, -1, -(2**31), 5, 10**6], dtype=torch.int32, device=on)
    parts = ((lists.mask_block_cnt, lists.mask_block_idx), (lists.full_block_cnt, lists.full_block_idx))
    right = [(cnt.clone(), idx.clone()) for cnt, idx in parts]
    for (cnt, idx), count in zip(parts, (2**31 - 1, 3), strict=True):
        cnt[:, :, 1], idx[:, :, 1] = count, wild
    parts[1][0][:, 1, 1] = -5
    options |= {"mask_mod": mods.dense(), "aux_tensors": [torch.rand(2, 2, 192, 140, device=on) < 0.5]}
    function = flash_attn_func if form == "dense" else flash_attn_varlen_func
    out, lse = function(q, k, v, return_lse=True, block_sparse_tensors=lists, **options)
    (mask, full) = right
    clean = BlockSparseTensors(*mask, *full, block_size=(64, 32))
    exact, exact_lse = reference.attention(q, k, v, block_sparse_tensors=clean, **options)
    rounded, rounded_lse = reference.attention(q, k, v, block_sparse_tensors=clean, **options, dtype=None)
    if form == "dense":
        rows = torch.tensor([*range(64), *range(128, 192)], device=on)
        axis, lse_axis = 1, 2
    else:
        rows, axis, lse_axis = torch.tensor([*range(64), *range(128, 256), *range(320, 342)], device=on), 0, 1
    right_beside(*(x.index_select(axis, rows) for x in (out, exact, rounded)), SLACK)
    right_beside(*(x.index_select(lse_axis, rows) for x in (lse, exact_lse, rounded_lse)), LSE_SLACK)


def test_values_are_checked_on_request(monkeypatch, recorder):
    q, k, v = (torch.zeros(2, 100, 2, 64, dtype=BF16) for _ in range(3))
    lists = random_blocks(1, 1, 100, 100, (64, 64), 1.0, ("full",))
    wrong = BlockSparseTensors(None, None, lists.full_block_cnt, lists.full_block_idx + 1, block_size=(64, 64))
    flash_attn_func(q, k, v, block_sparse_tensors=wrong)
    monkeypatch.setattr(checks, "VALUE_CHECKS", True)
    flash_attn_func(q, k, v, block_sparse_tensors=lists)
    assert len(recorder.calls) == 2
    message = r"^block_sparse_tensors.full_block_idx: expected from 0 to 1, .*, got 2 at batch 0, head 0, m_block 0"
    with pytest.raises(ValueError, match=message):
        flash_attn_func(q, k, v, block_sparse_tensors=wrong)
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(q, k, v, seqused_k=ints("cpu", 100, 20), block_sparse_tensors=wrong)
    assert len(recorder.calls) == 2


def call(lists=None, **changes):
    dtype = changes.pop("kv_dtype", BF16)
    q, k, v = (torch.zeros(2, 100, heads, 64, dtype=kind) for heads, kind in ((4, BF16), (2, dtype), (2, dtype)))
    lists = random_blocks(1, 4, 100, 100, (64, 32), 0.5, ("full",)) if lists is None else lists
    function = flash_attn_varlen_func if "seqused_k" in changes else flash_attn_func
    return function(q, k, v, block_sparse_tensors=lists, **changes)


USED = ints("cpu", 90, 100)
# (name, arguments, exception, argument named, what the rest of the message must hold)
WRONG = [
    ("a tuple", {"lists": (1, 2)}, TypeError, "block_sparse_tensors", ["BlockSparseTensors", "tuple"]),
    ("a mask list alone", {"lists": random_blocks(1, 1, 100, 100, (64, 32), 0.5)}, ValueError, "mask_mod", ["None"]),
    ("float8", {"kv_dtype": torch.float8_e4m3fn}, NotImplementedError, "k", ["block_sparse_tensors", "float8"]),
    ("splits", {"num_splits": 2}, NotImplementedError, "num_splits", ["block_sparse_tensors", "got 2"]),
    ("ranks", {"cp_world_size": 2, "cp_tot_seqused_k": USED, "seqused_k": USED}, NotImplementedError, "cp_world_size",
     ["block_sparse_tensors"]),
    ("heads of k", {"lists": random_blocks(1, 2, 100, 100, (64, 32), 0.5, ("full",))}, ValueError,
     "block_sparse_tensors.full_block_cnt", ["1 or 4", "(1, 2, 2)"]),
    ("another batch", {"lists": random_blocks(3, 1, 100, 100, (64, 32), 0.5, ("full",))}, ValueError,
     "block_sparse_tensors.full_block_cnt", ["1 or 2", "(3, 1, 2)"]),
    ("other rows", {"lists": random_blocks(1, 1, 200, 100, (64, 32), 0.5, ("full",))}, ValueError,
     "block_sparse_tensors.full_block_cnt", ["2 blocks of 64 rows", "100"]),
    ("too few rows", {"lists": random_blocks(1, 1, 50, 100, (64, 32), 0.5, ("full",)), "seqused_k": USED}, ValueError,
     "block_sparse_tensors.full_block_cnt", ["at least 2 blocks of 64 rows"]),
    ("other columns", {"lists": random_blocks(1, 1, 100, 200, (64, 32), 0.5, ("full",))}, ValueError,
     "block_sparse_tensors.full_block_idx", ["at most 4", "100"]),
]  # fmt: skip


@pytest.mark.parametrize("given, kind, argument, parts", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_refused(given, kind, argument, parts, recorder):
    with pytest.raises(kind) as caught:
        call(**given)
    message = str(caught.value)
    assert message.startswith(f"{argument}: expected ") and ", got " in message
    assert all(part in message for part in parts), message
    assert not recorder.calls


def test_right_calls_pass(recorder):
    call()
    call(lists=random_blocks(1, 1, 300, 200, (64, 32), 0.5, ("full",)), seqused_k=USED)
    assert [problem.sparse_block for problem in recorder.problems] == [(64, 32)] * 2
