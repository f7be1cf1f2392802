"""The same call gives the same bits, every time. A kernel that races shows here first."""

import math
from collections.abc import Callable

import pytest
import torch
from oracle import marks, rand

from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func


@pytest.mark.parametrize("causal", [False, True])
def test_dense(device, causal):
    on, rows = device.torch_device, device.pick(1111, 70)
    batch = device.pick(2, 1)
    q, k, v = rand(on, batch, rows, 4, 128), rand(on, batch, rows, 1, 128), rand(on, batch, rows, 1, 128)
    first = flash_attn_func(q, k, v, causal=causal, return_lse=True)
    for _ in range(device.pick(200, 1)):
        again = flash_attn_func(q, k, v, causal=causal, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_packed(device):
    on = device.torch_device
    lengths = device.pick((700, 1, 333, 64), (30, 1, 17))
    where = marks(on, *lengths)
    q, k = rand(on, sum(lengths), 6, 64), rand(on, sum(lengths), 2, 64)
    first = flash_attn_varlen_func(q, k, k, where, where, causal=True, return_lse=True)
    for _ in range(device.pick(200, 1)):
        again = flash_attn_varlen_func(q, k, k, where, where, causal=True, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


REPEATS = 1000
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class OtherWork:
    """Products and copies of changing size on a stream of their own: our blocks start and wait in another order."""

    def __init__(self, gpu: torch.device):
        self.stream = torch.cuda.Stream(gpu)
        self.factor = torch.randn(2048, 2048, device=gpu, dtype=torch.bfloat16)
        self.source = torch.randn(16 << 20, device=gpu)
        self.target = torch.empty_like(self.source)
        self.host = torch.empty(1 << 20, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(gpu))

    def start(self, turn: int) -> None:
        rows, words = 256 * (1 + turn % 8), (1 + turn % 5) << 20
        with torch.cuda.stream(self.stream):
            torch.mm(self.factor[:rows], self.factor)
            self.target[:words].copy_(self.source[:words])
            self.host.copy_(self.source[: 1 << 20], non_blocking=True)


def assert_same_bits(gpu: torch.device, call: Callable, out: torch.Tensor) -> None:
    """call writes `out` and returns (out, lse)."""
    first = [x.clone() for x in call()]
    other = OtherWork(gpu)
    differing = torch.zeros((), dtype=torch.int64, device=gpu)  # counted there: reading it would wait for each call
    for turn in range(REPEATS):
        other.start(turn)
        out.fill_(math.nan)
        for before, now in zip(first, call(), strict=True):
            bits = BITS[now.dtype]
            differing += (before.view(bits) != now.view(bits)).sum()
    torch.cuda.synchronize()
    assert first[0].isfinite().all()
    assert differing.item() == 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dims", [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)])
def test_dense_beside_other_work(gpu, head_dims, causal):
    _repeat_dense(gpu, *head_dims, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (256, 256)])
def test_dense_on_the_plain_kernel_beside_other_work(gpu, plain_kernel_only, head_dims, causal):
    _repeat_dense(gpu, *head_dims, causal)


def _repeat_dense(gpu: torch.device, head_dim: int, head_dim_v: int, causal: bool) -> None:
    q, k, v = rand(gpu, 2, 1111, 8, head_dim), rand(gpu, 2, 1300, 2, head_dim), rand(gpu, 2, 1300, 2, head_dim_v)
    out = torch.empty(*q.shape[:-1], head_dim_v, device=gpu, dtype=q.dtype)
    assert_same_bits(gpu, lambda: flash_attn_func(q, k, v, causal=causal, out=out, return_lse=True), out)


def test_packed_beside_other_work(gpu):
    where = marks(gpu, 700, 1, 333, 64, 1500)
    q, k = rand(gpu, 2598, 6, 128), rand(gpu, 2598, 2, 128)
    out = torch.empty_like(q)
    call = {"causal": True, "out": out, "return_lse": True}
    assert_same_bits(gpu, lambda: flash_attn_varlen_func(q, k, k, where, where, **call), out)
