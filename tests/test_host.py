"""What a steady call costs the host: no allocation but the outputs, and no work on tensors but theirs."""

import pytest
import torch
from oracle import marks, rand
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func, loader
from flash_attn_sm120.launchers import launches_on_cpu


class Operations(TorchDispatchMode):
    """Names of the tensor operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_kernel():
    with launches_on_cpu(lambda problem: lambda *arguments: None):
        yield


def test_tensor_operations(no_kernel, monkeypatch):
    q, k = rand("cpu", 2, 30, 4, 64), rand("cpu", 2, 50, 2, 64)
    out = torch.empty_like(q)
    where_q, where_k = marks("cpu", 25, 35), marks("cpu", 60, 40)
    packed_q, packed_k = q.flatten(0, 1), k.flatten(0, 1)
    monkeypatch.setattr("flash_attn_sm120.interface.tickets", lambda *_: None)  # kept on a GPU, made anew on a CPU
    calls = [
        (1, lambda: flash_attn_func(q, k, k)),
        (0, lambda: flash_attn_func(q, k, k, out=out, causal=True)),
        (2, lambda: flash_attn_func(q, k, k, return_lse=True, window_size=(5, 5))),
        (2, lambda: flash_attn_varlen_func(packed_q, packed_k, packed_k, where_q, where_k, 35, 60, return_lse=True)),
    ]
    for allocations, call in calls:
        with Operations() as operations:
            call()
        assert len(operations.names) == allocations, operations.names
        assert all("empty" in name for name in operations.names)


def test_gpu_allocations(gpu):
    q, k = rand(gpu, 2, 300, 4, 64), rand(gpu, 2, 500, 2, 64)
    out = torch.empty_like(q)
    where_q, where_k = marks(gpu, 250, 350), marks(gpu, 600, 400)
    packed_q, packed_k = q.flatten(0, 1), k.flatten(0, 1)
    calls = [
        (1, lambda: flash_attn_func(q, k, k)),
        (0, lambda: flash_attn_func(q, k, k, out=out, causal=True)),
        (2, lambda: flash_attn_func(q, k, k, return_lse=True, window_size=(5, 5))),
        (2, lambda: flash_attn_varlen_func(packed_q, packed_k, packed_k, where_q, where_k, 350, 600, return_lse=True)),
    ]
    for allocations, call in calls:
        call()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        results = [call() for _ in range(10)]
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 10 * allocations
        del results


def test_a_launcher_is_found_once(gpu, monkeypatch):
    q = rand(gpu, 1, 30, 1, 64)
    flash_attn_func(q, q, q, softcap=11.0)
    monkeypatch.setattr(loader, "load", lambda *_: pytest.fail("looked for again"))
    for rows in (17, 30, 500):  # few rows are the decode kernel's
        q = rand(gpu, 2, rows, 6, 64)
        flash_attn_func(q, q[:, :, :2], q[:, :, :2], softcap=12.0, softmax_scale=0.3)


def test_tickets_are_a_streams_own_and_a_captured_launch_has_new_ones(gpu):
    from flash_attn_sm120.workspace import tickets

    device, other = torch.zeros(1, device=gpu).device, torch.cuda.Stream()
    first = tickets(9, device)
    assert (first == 0).all() and first.numel() >= 9 and tickets(5, device) is first
    with torch.cuda.stream(other):
        assert tickets(9, device) is not first
    assert tickets(first.numel() + 1, device).numel() > first.numel()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one, two = tickets(9, device), tickets(9, device)
    assert one.data_ptr() != two.data_ptr()
    one.fill_(7)
    graph.replay()
    assert (one == 0).all()
