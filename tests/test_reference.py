"""The oracle against PyTorch's own attention and against the formula written as loops."""

import math

import pytest
import torch

from flash_attn_sm120 import reference


def loops(q, k, v, scale, left=None, right=None, softcap=0.0, *, chunk=0, sinks=None, slopes=None, columns=None):
    """One sequence in float64, a row and a head at a time; sides None for unbounded.

    sinks, slopes: (heads,). columns: (total, the position of each key), where k and v aren't all keys of the sequence.
    """
    seqlen_q, heads, _ = q.shape
    seqlen_k, heads_kv, _ = k.shape
    total, positions = columns or (seqlen_k, range(seqlen_k))
    out = torch.zeros(seqlen_q, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((heads, seqlen_q), -math.inf, dtype=torch.float64)
    for h in range(heads):
        kv = h // (heads // heads_kv)
        for i in range(seqlen_q):
            at = i + total - seqlen_q
            numerator, denominator = torch.zeros(v.shape[-1], dtype=torch.float64), 0.0
            if sinks is not None:
                denominator = math.exp(sinks[h])
            for j, position in enumerate(positions):
                if (left is not None and position < at - left) or (right is not None and position > at + right):
                    continue
                if chunk and math.floor(at / chunk) != math.floor(position / chunk):
                    continue
                score = torch.dot(k[j, kv].double(), q[i, h].double()).item() * scale
                if softcap:
                    score = softcap * math.tanh(score / softcap)
                if slopes is not None:
                    score -= float(slopes[h]) * abs(at - position)
                numerator += math.exp(score) * v[j, kv].double()
                denominator += math.exp(score)
            if denominator > 0:
                out[i, h] = numerator / denominator
                lse[h, i] = math.log(denominator)
    return out, lse


def assert_same(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


MASKS = {
    "full": ({}, None, None),
    "causal": ({"causal": True}, None, 0),
    "window": ({"window_size": (5, 3)}, 5, 3),
    "left": ({"window_size": (7, -1)}, 7, None),
    "right": ({"window_size": (None, 2)}, None, 2),
    "own column": ({"window_size": (0, 0)}, 0, 0),
    "causal window": ({"causal": True, "window_size": (4, 9)}, 4, 0),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(13, 13), (5, 17), (17, 5), (1, 9)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_against_loops(mask, seqlen_q, seqlen_k, softcap):
    options, left, right = MASKS[mask]
    q = torch.randn(2, seqlen_q, 6, 24)
    k, v = torch.randn(2, seqlen_k, 2, 24), torch.randn(2, seqlen_k, 2, 16)
    out, lse = reference.attention(q, k, v, softcap=softcap, softmax_scale=0.4, **options)
    for b in range(2):
        expected = loops(q[b], k[b], v[b], 0.4, left, right, softcap)
        assert_same(out[b], expected[0])
        assert_same(lse[b], expected[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_sdpa(causal, dtype):
    q, k, v = (torch.randn(2, 33, heads, 32, dtype=dtype) for heads in (4, 2, 2))
    out, _ = reference.attention(q, k, v, causal=causal)
    heads_first = [x.float().transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
    assert_same(out, expected.transpose(1, 2).double())
    assert out.dtype == torch.float32


def test_same_dtype_run_rounds_and_stays_near():
    q, k, v = (torch.randn(1, 64, 2, 64).bfloat16() for _ in range(3))
    exact, exact_lse = reference.attention(q, k, v)
    rounded, lse = reference.attention(q, k, v, dtype=None)
    assert rounded.dtype == torch.bfloat16 and lse.dtype == torch.float32
    error = (rounded.float() - exact).abs().max()
    assert 0 < error < 0.02
    assert 0 < (lse - exact_lse).abs().max() < 0.05


@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_each_sequence_alone(causal):
    lengths_q, lengths_k = [3, 0, 11, 6], [8, 4, 0, 5]
    cu_q = torch.tensor([0, 3, 3, 14, 20], dtype=torch.int32)
    cu_k = torch.tensor([0, 8, 12, 12, 17], dtype=torch.int32)
    q, k, v = torch.randn(22, 4, 16), torch.randn(17, 2, 16), torch.randn(17, 2, 8)
    out, lse = reference.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=causal)
    for b, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, columns = slice(cu_q[b], cu_q[b] + length_q), slice(cu_k[b], cu_k[b] + length_k)
        expected = loops(q[rows], k[columns], v[columns], 0.25, None, 0 if causal else None, 0.0)
        assert_same(out[rows], expected[0])
        assert_same(lse[:, rows], expected[1])
    assert (out[20:] == 0).all() and (lse[:, 20:] == -math.inf).all()


def test_seqused_bounds_rows_and_columns():
    q, k, v = torch.randn(3, 9, 2, 16), torch.randn(3, 12, 2, 16), torch.randn(3, 12, 2, 16)
    used_q, used_k = torch.tensor([9, 4, 0], dtype=torch.int32), torch.tensor([5, 12, 7], dtype=torch.int32)
    out, lse = reference.attention(q, k, v, seqused_q=used_q, seqused_k=used_k, causal=True)
    for b, (rows, columns) in enumerate(zip(used_q.tolist(), used_k.tolist(), strict=True)):
        expected = loops(q[b, :rows], k[b, :columns], v[b, :columns], 0.25, None, 0, 0.0)
        assert_same(out[b, :rows], expected[0])
        assert_same(lse[b, :, :rows], expected[1])
        assert (out[b, rows:] == 0).all() and (lse[b, :, rows:] == -math.inf).all()


def test_nothing_to_see():
    q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 0, 2, 16)
    out, lse = reference.attention(q, k, k)
    assert (out == 0).all() and (lse == -math.inf).all()
    k = torch.randn(1, 2, 2, 16)
    out, lse = reference.attention(q, k, k, causal=True)
    assert (out[:, :2] == 0).all() and (lse[:, :, :2] == -math.inf).all()
    assert out.isfinite().all() and lse[:, :, 2:].isfinite().all()


def test_pieces_make_the_whole(monkeypatch):
    q, k, v = torch.randn(1, 37, 6, 16), torch.randn(1, 41, 3, 16), torch.randn(1, 41, 3, 16)
    whole = reference.attention(q, k, v, causal=True, window_size=(20, 0))
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 41 * 2 * 5)
    pieces = reference.attention(q, k, v, causal=True, window_size=(20, 0))
    torch.testing.assert_close(pieces, whole)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(13, 13), (5, 17), (17, 5)])
@pytest.mark.parametrize("features", ["sinks", "slopes", "chunk", "all"])
def test_modifiers_against_loops(mask, seqlen_q, seqlen_k, features):
    options, left, right = MASKS[mask]
    q, k, v = torch.randn(2, seqlen_q, 6, 24), torch.randn(2, seqlen_k, 2, 24), torch.randn(2, seqlen_k, 2, 16)
    sinks = torch.randn(6) if features in ("sinks", "all") else None
    slopes = torch.rand(2, 6) if features in ("slopes", "all") else None
    chunk = 6 if features in ("chunk", "all") else 0
    given = {"learnable_sink": sinks, "alibi_slopes": slopes, "attention_chunk": chunk, "softcap": 2.0}
    out, lse = reference.attention(q, k, v, softmax_scale=0.4, **given, **options)
    for b in range(2):
        own = None if slopes is None else slopes[b]
        expected = loops(q[b], k[b], v[b], 0.4, left, right, 2.0, chunk=chunk, sinks=sinks, slopes=own)
        assert_same(out[b], expected[0])
        assert_same(lse[b], expected[1])
    if slopes is not None:
        one_for_all = reference.attention(q, k, v, softmax_scale=0.4, **given | {"alibi_slopes": slopes[1]}, **options)
        assert torch.equal(one_for_all[0][1], out[1])


def test_nothing_to_see_but_a_sink():
    q, k, sinks = torch.randn(2, 4, 2, 16), torch.randn(2, 3, 1, 16), torch.tensor([1.5, -2.0]).bfloat16()
    used = torch.tensor([0, 3], dtype=torch.int32)
    rows = torch.tensor([4, 2], dtype=torch.int32)
    out, lse = reference.attention(q, k, k, seqused_k=used, seqused_q=rows, learnable_sink=sinks, causal=True)
    assert (out[0] == 0).all() and torch.equal(lse[0], sinks.float()[:, None].expand(2, 4))
    assert (out[1, 2:] == 0).all() and (lse[1, :, 2:] == -math.inf).all()
    assert (out[1, :2] != 0).any() and lse[1, :, :2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("page_size", [8, 48])
def test_pages_are_the_rows_that_they_name(dtype, page_size):
    lengths = [100, 0, 47, 1]
    pages = [-(-length // page_size) for length in lengths]
    pool_k, pool_v = (torch.randn(sum(pages) + 3, page_size, 2, d).to(dtype) for d in (24, 16))
    order = torch.randperm(sum(pages)).tolist()
    table = torch.full((4, max(pages) + 1), 2**30, dtype=torch.int32)
    for b, count in enumerate(pages):
        table[b, :count] = torch.tensor([order.pop() for _ in range(count)])
    q = torch.randn(4, 7, 4, 24).bfloat16()
    used = torch.tensor(lengths, dtype=torch.int32)
    k_descale, v_descale = torch.rand(4, 2), torch.rand(4, 2)
    paged = {"page_table": table, "seqused_k": used, "k_descale": k_descale, "v_descale": v_descale, "causal": True}
    out, lse = reference.attention(q, pool_k, pool_v, **paged)
    for b, length in enumerate(lengths):
        k, v = (
            pool[table[b, : pages[b]].long()].flatten(0, 1)[:length].float() * factor[b][:, None]
            for pool, factor in ((pool_k, k_descale), (pool_v, v_descale))
        )
        expected = loops(q[b], k, v, 24**-0.5, None, 0)
        assert_same(out[b], expected[0])
        assert_same(lse[b], expected[1])
    in_one = reference.attention(q, pool_k, pool_v, **paged | {"k_descale": 0.5, "v_descale": torch.tensor([3.0])})
    by_hand = reference.attention(
        q, pool_k, pool_v, page_table=table, seqused_k=used, causal=True, softmax_scale=0.5 / 24**0.5
    )
    torch.testing.assert_close(in_one, (by_hand[0] * 3, by_hand[1]))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_combine_to_the_whole(mask, world):
    """Each rank against loops over its own keys, and all of them together against the whole."""
    options, left, right = MASKS[mask]
    lengths, chunk = [17, 1, 0, 30], 7
    q, k, v = torch.randn(4, 5, 4, 24), torch.randn(4, 30, 2, 24), torch.randn(4, 30, 2, 16)
    slopes, sinks = torch.rand(4), torch.randn(4)
    total = torch.tensor(lengths, dtype=torch.int32)
    given = {"alibi_slopes": slopes, "attention_chunk": chunk, **options}
    outs, lses = [], []
    for rank in range(world):
        own = torch.tensor([len(range(rank, n, world)) for n in lengths], dtype=torch.int32)
        local = {"cp_world_size": world, "cp_rank": rank, "cp_tot_seqused_k": total, "seqused_k": own}
        out, lse = reference.attention(q, k[:, rank::world], v[:, rank::world], **local, **given)
        for b, length in enumerate(lengths):
            columns = (length, range(rank, length, world))
            keys, values = k[b, rank:length:world], v[b, rank:length:world]
            expected = loops(q[b], keys, values, 24**-0.5, left, right, chunk=chunk, slopes=slopes, columns=columns)
            assert_same(out[b], expected[0])
            assert_same(lse[b], expected[1])
        outs.append(out)
        lses.append(lse.transpose(1, 2))
    whole, whole_lse = reference.attention(q, k, v, seqused_k=total, learnable_sink=sinks, **given)
    out, lse = reference.combine(torch.stack(outs), torch.stack(lses), learnable_sink=sinks)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse.transpose(1, 2))


def test_a_part_without_weight_may_hold_anything():
    out, lse = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 5, 4)
    out[1], lse[1] = math.nan, -math.inf
    lse[:, 0, 2] = -math.inf
    combined, whole = reference.combine(out, lse)
    assert (combined[0, 2] == 0).all() and (whole[0, 2] == -math.inf).all()
    first, third = (torch.exp(lse[i] - whole)[..., None] for i in (0, 2))
    seen = torch.ones(2, 5, dtype=torch.bool)
    seen[0, 2] = False
    torch.testing.assert_close(combined[seen], (first * out[0] + third * out[2])[seen])
    flat = reference.combine(out.flatten(1, 2), lse.flatten(1, 2))
    assert torch.equal(flat[0], combined.flatten(0, 1)) and torch.equal(flat[1], whole.flatten(0, 1))
    used = torch.tensor([5, 3], dtype=torch.int32)
    bounded, bounded_lse = reference.combine(out, lse, seqused=used)
    assert torch.equal(bounded[1, :3], combined[1, :3]) and (bounded[1, 3:] == 0).all()
    assert (bounded_lse[1, 3:] == -math.inf).all()
