"""The launcher for a problem on a device: compiled for its GPU, or, in tests, what stands in for it on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from flash_attn_sm120 import calls, checks
from flash_attn_sm120.problem import AttentionProblem

_launchers: dict[tuple[AttentionProblem, torch.device], Callable] = {}
_targets: dict[int, str] = {}
_lock = threading.Lock()
_cpu_load: Callable[[AttentionProblem], Callable] | None = None


def load(problem: AttentionProblem, device: torch.device) -> Callable:
    """The launcher for a problem on this device."""
    check_device(device)
    if device.type == "cpu":
        return _cpu_load(problem)
    launcher = _launchers.get((problem, device))
    if launcher is None:
        from flash_attn_sm120 import compile

        launcher = _launchers[problem, device] = compile.load(problem, target(device.index))
    return launcher


def check_device(device: torch.device) -> None:
    """The last check, so that a wrong call is told so on a machine without a GPU too."""
    if device.type == "cuda":
        target(device.index)
    elif device.type != "cpu" or _cpu_load is None:
        hint = f"{device} (flash_attn_sm120.simulator.simulate runs the kernels on a CPU, to test them)"
        checks.refuse("q", "a tensor on a CUDA device", hint)


def target(index: int) -> str:
    """What to compile for on a GPU, such as "sm_120a"; asked of the driver once."""
    found = _targets.get(index)
    if found is None:
        with _lock:
            if index not in _targets:
                _targets[index] = checks.target_of(torch.cuda.get_device_capability(index))
            found = _targets[index]
    return found


@contextmanager
def launches_on_cpu(load: Callable[[AttentionProblem], Callable]) -> Iterator[None]:
    """While open, CPU tensors are accepted and go to `load(problem)`, which takes a launcher's arguments. For tests."""
    global _cpu_load
    before, _cpu_load = _cpu_load, load
    calls.forget()
    try:
        yield
    finally:
        _cpu_load = before
        calls.forget()
