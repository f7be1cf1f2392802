"""What calls with pages, splits, scales, sinks, slopes, chunks and ranks hand to a kernel; no GPU needed."""

import math

import pytest
import torch
from test_host import Operations
from test_interface import make

from flash_attn_sm120 import (
    calls,
    dispatch,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_varlen_func,
    get_scheduler_metadata,
    prepare,
    scheduling,
)
from flash_attn_sm120.arguments import Numbers
from flash_attn_sm120.checks import UNBOUNDED
from flash_attn_sm120.problem import AttentionProblem, CombineProblem
from flash_attn_sm120.splits import Splits

BF16 = torch.bfloat16


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def pools(num_pages=6, page_size=16, heads_kv=2, head_dim=64, head_dim_v=64, dtype=BF16):
    return [torch.randn(num_pages, page_size, heads_kv, d).to(dtype) for d in (head_dim, head_dim_v)]


TABLE = ints(3, 0, 5, 1, 2, 4).view(2, 3)
USED = ints(33, 7)


def prefill(**options):
    """Packed, paged, 40 and 20 rows."""
    q = torch.randn(60, 4, 64).to(BF16)
    return flash_attn_varlen_func(q, *pools(), ints(0, 40, 60), None, 40, 48, seqused_k=USED, **options)


def decode(rows=1, **options):
    """Packed, paged, `rows` rows each."""
    q = torch.randn(2 * rows, 4, 64).to(BF16)
    where = ints(0, rows, 2 * rows)
    return flash_attn_varlen_func(q, *pools(), where, None, rows, 48, seqused_k=USED, page_table=TABLE, **options)


def test_pages(recorder):
    q, (k, v) = make()[0], pools(head_dim_v=32)
    out, lse = flash_attn_func(q, k, v, page_table=TABLE, seqused_k=USED, causal=True, return_lse=True)
    features = {"mask": "causal", "lse": True, "seqused_k": True, "page_size": 16}
    assert recorder.problems == [AttentionProblem("bfloat16", 64, 32, **features)]
    (call,) = recorder.calls
    assert call.k is k and call.v is v and call.out is out and call.lse is lse
    assert call.lengths.page_table is TABLE and call.lengths.seqused_k is USED
    assert [given is None for given in call.lengths] == [True, True, True, False, False, True]
    assert not recorder.partials
    assert out.shape == (2, 19, 4, 32) and lse.shape == (2, 4, 19)


def test_pages_with_packed_rows(recorder):
    prefill(page_table=TABLE)
    prefill(block_table=TABLE)
    (problem,) = recorder.problems
    assert problem.packed_q and not problem.packed_k and problem.page_size == 16
    assert all(call.lengths.page_table is TABLE for call in recorder.calls)


def test_pools_in_any_strides_are_taken_as_they_are(recorder):
    q = make()[0]
    both = torch.randn(6, 2, 16, 2, 64).to(BF16)
    heads_first = torch.randn(6, 2, 16, 64).to(BF16).transpose(1, 2)
    for k, v in (both.unbind(1), (heads_first, heads_first), (both[:, 0, :8], both[:, 1, 8:])):
        recorder.calls.clear()
        flash_attn_func(q, k, v, page_table=TABLE[:, :2], seqused_k=USED)
        assert recorder.calls[0].k is k and recorder.calls[0].v is v
    single = torch.randn(6, 16, 64).to(BF16).as_strided((6, 16, 1, 64), (1024, 64, 7, 1))
    flash_attn_func(q, single, single, page_table=TABLE, seqused_k=USED)
    assert recorder.calls[-1].k.data_ptr() == single.data_ptr()
    assert not any(stride % 8 for stride in recorder.calls[-1].k.stride()[:-1])


def test_padded_keys_have_lengths_in_the_dense_function(recorder):
    flash_attn_func(*make(), seqused_k=USED)
    assert recorder.problems == [AttentionProblem("bfloat16", 64, 64, seqused_k=True)]
    assert recorder.calls[0].lengths.seqused_k is USED


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(dtype, recorder):
    q, (k, v) = make()[0], pools(dtype=dtype)
    k_descale, v_descale = torch.rand(2, 2), torch.rand(2, 2)
    options = {"page_table": TABLE, "seqused_k": USED, "k_descale": k_descale, "v_descale": v_descale}
    out = flash_attn_func(q, k, v, **options)
    (problem,) = recorder.problems
    assert problem.kv_dtype == str(dtype).removeprefix("torch.") and problem.k_descale and problem.v_descale
    (call,) = recorder.calls
    assert call.modifiers.k_descale is k_descale and call.modifiers.v_descale is v_descale
    assert out.dtype == BF16


@pytest.mark.parametrize("shape", [(1,), ()])
def test_one_scale_for_all_is_repeated_without_a_copy(shape, recorder):
    scale = torch.rand(shape)
    flash_attn_func(*make(), k_descale=scale, v_descale=scale)
    taken = recorder.calls[0].modifiers
    for given in (taken.k_descale, taken.v_descale):
        assert given.shape == (2, 2) and given.data_ptr() == scale.data_ptr() and given.stride() == (0, 0)


def test_scales_that_are_numbers(recorder):
    flash_attn_func(*make(), k_descale=3, softmax_scale=0.25, softcap=2.0)
    assert recorder.problems == [AttentionProblem("bfloat16", 64, 64, softcap=True)]
    assert recorder.calls[0].numbers[:2] == (0.75, 2.0) and set(recorder.calls[0].modifiers) == {None}
    flash_attn_func(*make(), k_descale=1.0, v_descale=1.0, q_descale=1)
    assert recorder.problems[1] == AttentionProblem("bfloat16", 64, 64)
    for _ in range(2):
        flash_attn_func(*make(), v_descale=0.5)
    assert recorder.problems[2] == AttentionProblem("bfloat16", 64, 64, v_descale=True)
    first, second = (call.modifiers.v_descale for call in recorder.calls[2:])
    assert first.shape == (2, 2) and (first == 0.5).all() and first.data_ptr() == second.data_ptr()
    flash_attn_func(*make(), v_descale=0.25)
    assert (recorder.calls[-1].modifiers.v_descale == 0.25).all()


@pytest.mark.parametrize("name", ["learnable_sink", "s_aux"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sink(name, dtype, recorder):
    sink = torch.randn(4).to(dtype)
    flash_attn_func(*make(), **{name: sink})
    assert recorder.problems[0].sink == str(dtype).removeprefix("torch.")
    assert recorder.calls[0].modifiers.learnable_sink is sink


def test_slopes(recorder):
    slopes = torch.rand(4)
    flash_attn_func(*make(), alibi_slopes=slopes)
    taken = recorder.calls[0].modifiers.alibi_slopes
    assert taken.shape == (2, 4) and taken.data_ptr() == slopes.data_ptr() and taken.stride() == (0, 1)
    each = torch.rand(2, 4)
    flash_attn_func(*make(), alibi_slopes=each)
    assert recorder.calls[1].modifiers.alibi_slopes is each
    assert all(problem.alibi for problem in recorder.problems)


def test_chunk(recorder):
    for chunk in (None, 0, 7, 2**40):
        flash_attn_func(*make(), attention_chunk=chunk)
    assert [call.numbers.attention_chunk for call in recorder.calls] == [0, 0, 7, UNBOUNDED]
    assert [problem.chunked for problem in recorder.problems] == [False, False, True, True]
    assert {problem.mask for problem in recorder.problems} == {"full"}


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window_size": (3, 3)}, {"alibi_slopes": torch.rand(4)}, {"attention_chunk": 3}]
)
def test_ranks(options, recorder):
    total = ints(41, 40)
    ranks = {"cp_world_size": 2, "cp_rank": 1, "cp_tot_seqused_k": total}
    flash_attn_func(*make(), **ranks, **options)
    assert recorder.problems[0].context_parallel
    assert recorder.calls[0].lengths.cp_tot_seqused_k is total and recorder.calls[0].numbers[-2:] == (2, 1)


def test_ranks_of_a_call_without_positions_are_no_matter(recorder):
    sink = torch.randn(4)
    ranks = {"cp_world_size": 2, "cp_rank": 1, "cp_tot_seqused_k": ints(41, 40)}
    flash_attn_func(*make(), **ranks, s_aux=sink)
    assert not recorder.problems[0].context_parallel
    assert recorder.calls[0].lengths.cp_tot_seqused_k is None


def test_few_rows_are_the_decode_kernels(recorder):
    for rows in (1, dispatch.DECODE_ROWS, dispatch.DECODE_ROWS + 1):
        flash_attn_func(*make(seqlen_q=rows), num_splits=1)
        decode(rows, num_splits=1)
    assert [problem.decode for problem in recorder.problems] == [True, True, True, True, False, False]
    assert not any(problem.split for problem in recorder.problems)
    assert recorder.partials == [None] * 4
    q, k, v = torch.randn(8, 4, 64).to(BF16), *pools()
    flash_attn_varlen_func(q, k, v, ints(0, 4, 8), seqused_k=USED, page_table=TABLE)
    assert not recorder.problems[-1].decode


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
def test_splits_as_asked(rows, lse, recorder):
    out = decode(rows, num_splits=5, return_lse=lse)
    assert recorder.problems[0].decode and recorder.problems[0].split and recorder.problems[0].lse == lse
    (partials,) = recorder.partials
    assert partials.out.shape == (5, 2 * rows, 4, 64) and partials.lse.shape == (5, 4, 2 * rows)
    assert partials.out.dtype == partials.lse.dtype == torch.float32
    assert partials.tickets.dtype == torch.int32 and partials.tickets.numel() >= 4 and (partials.tickets == 0).all()
    assert recorder.calls[0].out is (out[0] if lse else out)
    flash_attn_func(*make(seqlen_q=3, head_dim_v=32), num_splits=2, learnable_sink=torch.randn(4))
    assert recorder.partials[1].out.shape == (2, 2, 3, 4, 32) and recorder.partials[1].lse.shape == (2, 2, 4, 3)
    assert recorder.problems[1].sink == "float32" and recorder.calls[1].modifiers.learnable_sink is not None


def test_splits_are_chosen_from_sizes(recorder, monkeypatch):
    asked = []

    def choose(problem, sms, q_shape, heads_kv, batch, max_seqlen_q, max_seqlen_k, num_splits):
        asked.append((sms, batch, heads_kv, max_seqlen_q, max_seqlen_k))
        return Splits(len(asked), 1, 64)

    monkeypatch.setattr(prepare, "choose_splits", choose)
    decode()
    decode(9)
    decode(window_size=(20, 0))
    decode(2, attention_chunk=8)
    flash_attn_func(*make(batch=1, seqlen_q=1, seqlen_k=700, heads=8))
    sms = asked[0][0]
    assert sms > 1 and asked == [
        (sms, 2, 2, 1, 48), (sms, 2, 2, 9, 48), (sms, 2, 2, 1, 21),
        (sms, 2, 2, 2, 16), (sms, 1, 2, 1, 700),
    ]  # fmt: skip
    assert [problem.split for problem in recorder.problems] == [False, True, True, True, True]
    assert [partials and partials.out.shape[0] for partials in recorder.partials] == [None, 2, 3, 4, 5]
    decode()
    assert len(asked) == 5
    prefill(page_table=TABLE)
    assert len(asked) == 5


def test_a_growing_length_is_seldom_a_new_call(recorder):
    q, (k, v) = torch.randn(2, 4, 64).to(BF16), pools(64)
    table = torch.zeros(2, 64, dtype=torch.int32)
    for longest in range(1, 1025):
        flash_attn_varlen_func(q, k, v, ints(0, 1, 2), None, 1, longest, seqused_k=USED, page_table=table)
    assert len(calls.known) == 4
    rows = torch.randn(60, 4, 64).to(BF16)
    for longest in (40, 41):
        flash_attn_varlen_func(
            rows, k, v, ints(0, 40, 60), None, longest, 99 * longest, seqused_k=USED, page_table=table
        )
    assert len(calls.known) == 5


def test_scheduler_metadata(recorder, monkeypatch):
    def choose(problem, sms, q_shape, heads_kv, batch, max_seqlen_q, max_seqlen_k, num_splits=0):
        expected = (batch, heads_kv, max_seqlen_q, max_seqlen_k) == (2, 2, 1, 48)
        return Splits(num_splits or (3 if expected else 99), 1, 64)

    for module in (prepare, scheduling):
        monkeypatch.setattr(module, "choose_splits", choose)
    given = {
        "batch_size": 2,
        "max_seqlen_k": 48,
        "num_heads_q": 4,
        "num_heads_kv": 2,
        "headdim": 64,
        "cache_seqlens": USED,
    }
    metadata = get_scheduler_metadata(max_seqlen_q=1, **given)
    assert metadata.num_splits == 3
    decode(scheduler_metadata=metadata)
    decode(scheduler_metadata=metadata, num_splits=2)
    decode(scheduler_metadata=None)
    assert [partials.out.shape[0] for partials in recorder.partials] == [3, 2, 3]
    assert get_scheduler_metadata(max_seqlen_q=40, **given).num_splits == 1
    assert get_scheduler_metadata(max_seqlen_q=40, num_splits=7, **given).num_splits == 7
    assert get_scheduler_metadata(max_seqlen_q=1, window_size=(9, 0), **given).num_splits == 99


def test_numbers_in_full(recorder):
    ranks = {"cp_world_size": 3, "cp_rank": 2, "cp_tot_seqused_k": ints(41, 40)}
    flash_attn_func(*make(), softmax_scale=0.5, softcap=4.0, window_size=(7, 2), attention_chunk=9, **ranks)
    assert recorder.calls[0].numbers == Numbers(0.5, 4.0, 7, 2, 9, 3, 2)


def test_out_and_lse_of_a_split_call_over_an_input(recorder):
    q, k, v = make(seqlen_q=3, seqlen_k=3, heads=2)
    assert flash_attn_func(q, k, v, out=q, num_splits=2) is q
    assert recorder.calls[0].out.data_ptr() != q.data_ptr() and (q == 1).all()


@pytest.mark.parametrize("packed", [False, True])
def test_combine(packed, recorder):
    shape = (9, 4, 64) if packed else (2, 9, 4, 64)
    parts, lse_parts = torch.randn(3, *shape), torch.randn(3, *shape[:-1])
    out, lse = flash_attn_combine(parts, lse_parts)
    assert recorder.problems == [CombineProblem("float32", 64, lse=True, packed=packed)]
    (call,) = recorder.calls
    assert call.out is out and out.shape == shape and out.dtype == torch.float32
    assert call.out_partial.data_ptr() == parts.data_ptr() and torch.equal(call.lse_partial, lse_parts.mT)
    assert call.lse_partial.data_ptr() == lse_parts.data_ptr()
    assert lse.shape == shape[:-1] and lse.data_ptr() == call.lse.data_ptr() and call.lse.is_contiguous()
    assert call[4:] == (None, None, None)


def test_combine_with_everything(recorder):
    parts, lse_parts, sink = torch.randn(3, 9, 4, 64), torch.randn(3, 9, 4), torch.randn(4).to(BF16)
    out, where, used = torch.empty(9, 4, 64, dtype=torch.float16), ints(0, 4, 9), ints(4, 2)
    given = {"out": out, "cu_seqlens": where, "seqused": used, "learnable_sink": sink, "return_lse": False}
    result, lse = flash_attn_combine(parts, lse_parts, **given)
    assert result is out and lse is None
    features = {"packed": True, "cu_seqlens": True, "seqused": True, "sink": "bfloat16"}
    assert recorder.problems == [CombineProblem("float16", 64, **features)]
    (call,) = recorder.calls
    assert call.out is out and call.lse is None and call.cu_seqlens is where and call.seqused is used
    assert torch.equal(call.learnable_sink, sink)
    assert flash_attn_combine(parts, lse_parts, out_dtype=BF16)[0].dtype == BF16


def test_combine_in_place_and_in_odd_strides(recorder):
    parts, lse_parts = torch.randn(3, 2, 9, 4, 65)[..., :64], torch.randn(3, 2, 9, 4)
    flash_attn_combine(parts, lse_parts)
    taken = recorder.calls[0].out_partial
    assert torch.equal(taken, parts) and not any(stride % 4 for stride in taken.stride()[:-1])
    parts = torch.randn(3, 2, 9, 4, 64)
    out, _ = flash_attn_combine(parts, lse_parts, out=parts[0])
    assert recorder.calls[1].out.data_ptr() != parts.data_ptr() and (parts[0] == 1).all() and out._base is parts


def test_nothing_to_combine_is_not_launched(recorder):
    out, lse = flash_attn_combine(torch.zeros(2, 0, 4, 64), torch.zeros(2, 0, 4))
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4) and not recorder.calls


def test_a_steady_call_does_no_work_on_tensors(recorder):
    k, v = torch.randn(6, 2, 16, 2, 64).to(BF16).unbind(1)
    q, where, scales, sink = torch.randn(2, 4, 64).to(BF16), ints(0, 1, 2), torch.rand(2, 2), torch.rand(4)
    out, pages = torch.empty_like(q), {"page_table": TABLE, "seqused_k": USED}
    several = {"k_descale": scales, "v_descale": scales, "s_aux": sink, "alibi_slopes": torch.rand(2, 4), **pages}
    cases = [
        (0, lambda: flash_attn_varlen_func(q, k, v, where, None, 1, 48, out=out, num_splits=1, **pages)),
        (0, lambda: flash_attn_varlen_func(q, k, v, where, None, 1, 48, out=out, num_splits=1, causal=True, **several)),
        (3, lambda: flash_attn_varlen_func(q, k, v, where, None, 1, 48, out=out, num_splits=4, **several)),
        (5, lambda: flash_attn_varlen_func(q, k, v, where, None, 1, 48, num_splits=4, return_lse=True, **pages)),
    ]
    for allocations, call in cases:
        call()
        with Operations() as operations:
            call()
        names = [name for name in operations.names if name != "fill_"]  # the recorder's
        assert len(names) == allocations and all("empty" in name or name == "zeros" for name in names), names


def test_defaults_are_flash_attns(recorder):
    """Every neutral value, given by name."""
    neutral = {
        "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0, "learnable_sink": None,
        "s_aux": None, "alibi_slopes": None, "attention_chunk": 0, "page_table": None, "block_table": None,
        "q_descale": None, "k_descale": None, "v_descale": None, "num_splits": 0, "scheduler_metadata": None,
        "cp_world_size": 1, "cp_rank": 0, "cp_tot_seqused_k": None, "seqused_k": None, "pack_gqa": None,
    }  # fmt: skip
    q, k, v = make()
    flash_attn_func(q, k, v, **neutral)
    flash_attn_varlen_func(q, k, v, None, None, None, None, **neutral)
    assert set(recorder.problems) == {AttentionProblem("bfloat16", 64, 64)}
    assert recorder.calls[0][4:] == recorder.calls[1][4:]
    assert recorder.calls[0].numbers.softmax_scale == 1 / math.sqrt(64)
