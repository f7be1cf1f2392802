"""Calls at the edges of what is allowed: nothing to see, very long, very large, other streams, other GPUs."""

import math

import pytest
import torch
from oracle import assert_right, ints, marks, rand

from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func, reference

BF16 = torch.bfloat16


def assert_blank(out, lse):
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("causal", [False, True])
def test_no_columns(device, causal):
    on = device.torch_device
    q, k = rand(on, 2, 37, 4, 64), rand(on, 2, 0, 2, 64)
    assert_blank(*assert_right(q, k, k, causal=causal))
    lengths = {"cu_seqlens_q": marks(on, 30, 44), "cu_seqlens_k": marks(on, 0, 0)}
    assert_blank(*assert_right(q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1), **lengths, causal=causal))


def test_no_rows_and_no_batch(device):
    on = device.torch_device
    for batch, seqlen_q in ((2, 0), (0, 5), (0, 0)):
        q, k = rand(on, batch, seqlen_q, 4, 64), rand(on, batch, 7, 2, 64)
        out, lse = flash_attn_func(q, k, k, return_lse=True)
        assert out.shape == (batch, seqlen_q, 4, 64) and lse.shape == (batch, 4, seqlen_q)
    q, k = rand(on, 0, 4, 64), rand(on, 9, 2, 64)
    out, lse = flash_attn_varlen_func(q, k, k, marks(on, 0, 0), marks(on, 4, 5), 0, 5, return_lse=True)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_of_length_zero(device, causal):
    on = device.torch_device
    lengths_q, lengths_k = (0, 5, 0, 19, 33, 0), (3, 0, 0, 40, 1, 7)
    q, k, v = (rand(on, sum(n), h, 64) for n, h in ((lengths_q, 4), (lengths_k, 2), (lengths_k, 2)))
    lengths = {"cu_seqlens_q": marks(on, *lengths_q), "cu_seqlens_k": marks(on, *lengths_k)}
    out, lse = assert_right(q, k, v, **lengths, causal=causal)
    assert_blank(out[:5], lse[:, :5])


@pytest.mark.parametrize("sequences", [1, 31, 33, 70])
def test_many_short_sequences(device, sequences):
    on = device.torch_device
    lengths = [(7 * i + 3) % 5 for i in range(sequences)]
    q, k = rand(on, sum(lengths), 1, 64), rand(on, sum(lengths), 1, 64)
    where = marks(on, *lengths)
    assert_right(q, k, k, cu_seqlens_q=where, cu_seqlens_k=where, causal=True)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(150, 20), (33, 32), (300, 1), (1, 130), (17, 140)])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window_size": (9, 4)}, {"causal": True, "window_size": (9, -1)}]
)
def test_lengths_that_differ_under_a_mask(device, seqlen_q, seqlen_k, options):
    on = device.torch_device
    q, k, v = rand(on, 1, seqlen_q, 2, 64), rand(on, 1, seqlen_k, 1, 64), rand(on, 1, seqlen_k, 1, 64)
    out, lse = assert_right(q, k, v, **options)
    hidden = max(0, seqlen_q - seqlen_k - (4 if options == {"window_size": (9, 4)} else 0))
    assert_blank(out[:, :hidden], lse[..., :hidden])


@pytest.mark.parametrize("seqlen", [1, 15, 17, 63, 65, 127, 129, 255, 257])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_tiles(device, seqlen, causal):
    q, k, v = (rand(device.torch_device, 1, seqlen, 1, 64) for _ in range(3))
    assert_right(q, k, v, causal=causal)


@pytest.mark.parametrize("window", [(0, 0), (-1, 0), (0, -1), (16, 16), (63, 1), (1000, 0), (5, 1000)])
def test_windows(device, window):
    q, k, v = (rand(device.torch_device, 1, 140, 1, 64) for _ in range(3))
    assert_right(q, k, v, window_size=window)


def test_padded_rows_are_blank(device):
    on = device.torch_device
    q, k, v = rand(on, 3, 40, 4, 64), rand(on, 3, 50, 2, 64), rand(on, 3, 50, 2, 64)
    used_q, used_k = ints(on, 40, 13, 0), ints(on, 21, 50, 30)
    out, lse = assert_right(q, k, v, seqused_q=used_q, seqused_k=used_k, causal=True)
    for b, rows in enumerate(used_q.tolist()):
        assert_blank(out[b, rows:], lse[b, :, rows:])


def test_packed_rows_past_the_last_sequence_are_left_alone(device):
    on = device.torch_device
    q, k = rand(on, 60, 2, 64), rand(on, 60, 2, 64)
    where = marks(on, 20, 25)
    assert_right(q, k, k, cu_seqlens_q=where, cu_seqlens_k=where)


@pytest.mark.parametrize(
    "cu_seqlens", [(0, 500, 700), (-90, 20, 40), (30, 10, 40), (0, 40, 2**31 - 1), (-(2**31), 5, 40)]
)
@pytest.mark.parametrize("seqused", [None, (-5, 10**9)])
def test_wrong_lengths_touch_nothing_outside(device, cu_seqlens, seqused):
    """Unchecked on the host, so the kernel clamps: whatever they hold, memory around out stays as it was."""
    on = device.torch_device
    frame = torch.full((3, 40, 2, 64), 7.0, dtype=BF16, device=on)
    q = rand(on, 40, 2, 64)
    wrong, right = ints(on, *cu_seqlens), marks(on, 20, 20)
    used = None if seqused is None else ints(on, *seqused)
    for cu_q, cu_k in ((wrong, right), (right, wrong), (wrong, wrong)):
        try:
            flash_attn_varlen_func(q, q, q, cu_q, cu_k, seqused_k=used, seqused_q=used, out=frame[1])
            if on.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            # Rows that wrong lengths leave out aren't written, which the simulator reports; all else is a fault.
            if "unwritten output" not in str(error):
                raise
        assert (frame[::2] == 7.0).all()


def test_out_in_place_of_any_stride(device):
    on = device.torch_device
    q, k, v = rand(on, 2, 33, 2, 64), rand(on, 2, 50, 2, 64), rand(on, 2, 50, 2, 64)
    frames = [rand(on, 2, 2, 33, 64).transpose(1, 2), rand(on, 2, 33, 2, 72)[..., :64], rand(on, 2, 33, 2, 65)[..., 1:]]
    for out in frames:
        assert_right(q, k, v, out=out)


def test_out_keeps_to_its_elements(device):
    on = device.torch_device
    q = rand(on, 1, 33, 2, 40)
    frame = torch.full((1, 35, 4, 56), 7.0, dtype=BF16, device=on)
    out = frame[:, 1:34, 1:3, 8:48]
    assert_right(q, q, q, out=out)
    out.fill_(7.0)
    assert (frame == 7.0).all()


@pytest.mark.parametrize("shift", [0, 1])
def test_inputs_of_any_stride(device, shift):
    on = device.torch_device
    fused = rand(on, 2, 33, 3 * 2 * (64 + shift) + shift)
    parts = fused[..., shift:].unflatten(-1, (3, 2, 64 + shift))[..., :64]
    assert_right(*parts.unbind(2), causal=True)
    heads_first = rand(on, 2, 2, 33, 64).transpose(1, 2)
    one_for_all = rand(on, 1, 33, 1, 64).expand(2, -1, 2, -1)
    assert_right(heads_first, one_for_all, one_for_all)


def test_columns_beyond_the_end_are_not_read(device):
    """NaN and infinity right behind the used rows must not reach the result."""
    on = device.torch_device
    q, k, v = rand(on, 1, 20, 1, 64), rand(on, 1, 90, 1, 64), rand(on, 1, 90, 1, 64)
    k[:, 41:], v[:, 41:] = math.inf, math.nan
    assert_right(q, k[:, :41], v[:, :41])
    out, _ = flash_attn_varlen_func(q, k, v, seqused_k=ints(on, 41), return_lse=True)
    assert torch.equal(out, flash_attn_func(q, k[:, :41], v[:, :41]))


def test_large_scores_stay_finite(device):
    q, k, v = (rand(device.torch_device, 1, 70, 1, 64) for _ in range(3))
    out, lse = flash_attn_func(30 * q, 30 * k, v, causal=True, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    assert torch.equal(out[:, 0], v[:, 0])


def test_gradient_tensors_without_grad_mode(device):
    q = rand(device.torch_device, 1, 9, 1, 64).requires_grad_()
    with torch.no_grad():
        out = flash_attn_func(q, q, q)
    assert not out.requires_grad and out.isfinite().all()


def need_memory(gigabytes):
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


def test_128k_tokens(gpu):
    need_memory(4)
    q, k, v = rand(gpu, 1, 131072, 2, 64), rand(gpu, 1, 131072, 1, 64), rand(gpu, 1, 131072, 1, 64)
    out = flash_attn_func(q, k, v, causal=True)
    for start in (0, 65536 - 50, 131072 - 100):
        end = start + 100
        exact, _ = reference.attention(q[:, start:end], k[:, :end], v[:, :end], causal=True)
        assert (out[:, start:end] - exact).abs().max() <= 0.0156


def test_more_than_2_31_elements_in_a_batch(gpu):
    need_memory(24)
    shape = (66, 4096, 64, 128)
    q = torch.empty(shape, dtype=BF16, device=gpu).normal_()
    k = torch.empty(shape, dtype=BF16, device=gpu).normal_()
    assert q.numel() > 2**31
    out = flash_attn_func(q, k, k, window_size=(200, 0))
    for b in (0, 65):
        exact, _ = reference.attention(q[b : b + 1], k[b : b + 1], k[b : b + 1], window_size=(200, 0))
        assert (out[b : b + 1] - exact).abs().max() <= 0.0156


def test_more_than_2_31_elements_in_a_sequence(gpu):
    need_memory(16)
    wide = torch.empty(70000, 256, 128, dtype=BF16, device=gpu).normal_()
    assert wide.numel() > 2**31
    q, k = wide[:, :2], wide[:, 254:]
    out = torch.empty_like(wide)[:, 100:102]
    where = marks(gpu, 100, 69900)
    flash_attn_varlen_func(q, k, k, where, where, causal=True, window_size=(300, 0), out=out)
    last = (x[None, -500:] for x in (q, k, k))
    exact, _ = reference.attention(*last, causal=True, window_size=(300, 0))
    assert (out[-200:] - exact[0, -200:]).abs().max() <= 0.0156


def test_current_stream(gpu):
    """The inputs are there only after a long wait on this stream; a launch on another one would read NaN."""
    q, k, v = (rand(gpu, 1, 300, 2, 64) for _ in range(3))
    expected = flash_attn_func(q, k, v)
    late = [torch.full_like(x, math.nan) for x in (q, k, v)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for into, source in zip(late, (q, k, v), strict=True):
            into.copy_(source)
        out = flash_attn_func(*late)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_cuda_graph(gpu):
    q, k, v = (rand(gpu, 1, 300, 2, 64) for _ in range(3))
    flash_attn_func(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, causal=False)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, flash_attn_func(q, k, v))


def test_the_tensors_own_gpu(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = (rand("cuda:0", 1, 100, 2, 64) for _ in range(3))
    expected = flash_attn_func(q, k, v, causal=True)
    for current in (0, 1):
        with torch.cuda.device(current):
            for index in (1, 0, 1):
                there = [x.to(f"cuda:{index}") for x in (q, k, v)]
                out = flash_attn_func(*there, causal=True)
                assert out.device.index == index and torch.cuda.current_device() == current
                assert torch.equal(out.to("cuda:0"), expected)
    with pytest.raises(ValueError, match=r"^k: expected a tensor on cuda:0 as q, got"):
        flash_attn_func(q, k.to("cuda:1"), v)
