"""The oracle against PyTorch's own attention and against the formula written as loops."""

import math

import pytest
import torch

from flash_attn_sm120 import reference


def loops(q, k, v, scale, left, right, softcap):
    """One sequence in float64, a row and a head at a time; sides None for unbounded."""
    seqlen_q, heads, _ = q.shape
    seqlen_k, heads_kv, _ = k.shape
    out = torch.zeros(seqlen_q, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((heads, seqlen_q), -math.inf, dtype=torch.float64)
    for h in range(heads):
        kv = h // (heads // heads_kv)
        for i in range(seqlen_q):
            at = i + seqlen_k - seqlen_q
            first = 0 if left is None else max(0, at - left)
            last = seqlen_k - 1 if right is None else min(seqlen_k - 1, at + right)
            if first > last:
                continue
            scores = (k[first : last + 1, kv].double() @ q[i, h].double()) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = torch.exp(scores - scores.max())
            out[i, h] = (weights[:, None] * v[first : last + 1, kv].double()).sum(0) / weights.sum()
            lse[h, i] = scores.max() + weights.sum().log()
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
