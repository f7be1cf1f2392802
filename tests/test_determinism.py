"""The same call gives the same bits, every time. A kernel that races shows here first."""

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
