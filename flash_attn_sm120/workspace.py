"""Memory that the blocks of a split launch share, partial results and tickets, which are zeros between launches; and
memory that outlasts a call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from flash_attn_sm120.calls import Call

_tickets: dict[tuple[int, int], torch.Tensor] = {}  # of a device and stream, whose launches follow one another


def partials(q: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The fields of arguments.Partials. The first two are PyTorch's allocator's to reuse."""
    out = q.new_empty((call.num_splits, *call.out_shape), dtype=torch.float32)
    lse = q.new_empty((call.num_splits, *call.lse_rows), dtype=torch.float32)
    return out, lse, tickets(call.tickets, q.device), call.slots


def tickets(count: int, device: torch.device) -> torch.Tensor:
    """At least `count` zeros that no other launch uses at the same time; a launch leaves them zeros.

    A captured launch has its own, as nobody knows on which stream and beside which others its graph is replayed.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    found = _tickets.get(key)
    if found is None or found.numel() < count:
        size = max(count, 4096)
        found = _tickets[key] = lasting(lambda: torch.zeros(size, dtype=torch.int32, device=device), device)
    return found


def lasting(make: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """make(), in memory that no CUDA graph calls its own: while PyTorch warms a graph up, what this thread and stream
    allocate belongs to the graph's pool, which mustn't be kept. Waits for the device."""
    if device.type != "cuda":
        return make()

    def elsewhere() -> torch.Tensor:
        with torch.cuda.device(device):
            made = make()
            torch.cuda.current_stream().synchronize()
        return made

    with ThreadPoolExecutor(1) as other:
        return other.submit(elsewhere).result()
