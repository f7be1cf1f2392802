"""The launcher for a problem on a device: the one for its GPU, or, in tests, what stands in for it on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from flash_attn_sm120 import calls, checks, dispatch, loader
from flash_attn_sm120.kernel_file import Problem
from flash_attn_sm120.problem import AttentionProblem

_launchers: dict[tuple[Problem, torch.device], Callable] = {}
_plans: dict[tuple[AttentionProblem, str], dispatch.Plan] = {}
_targets: dict[int, str] = {}
_lock = threading.Lock()
SIMULATED = "sm_120a"  # what stands in on a CPU
_cpu_load: Callable[[Problem], Callable] | None = None


def load(problem: Problem, device: torch.device, name: str = "q") -> Callable:
    """The launcher for a problem on this device, which is that of argument `name`."""
    check_device(device, name)
    if device.type == "cpu":
        return _cpu_load(problem)
    launcher = _launchers.get((problem, device))
    if launcher is None:
        launcher = _launchers[problem, device] = loader.load(problem, target(device.index))
    return launcher


def check_device(device: torch.device, name: str = "q") -> None:
    """The last check, so that a wrong call is told so on a machine without a GPU too."""
    if device.type == "cuda":
        target(device.index)
    elif device.type != "cpu" or _cpu_load is None:
        hint = f"{device} (flash_attn_sm120.simulator.simulate runs the kernels on a CPU, to test them)"
        checks.refuse(name, "a tensor on a CUDA device", hint)


def target(index: int) -> str:
    """What to compile for on a GPU, such as "sm_120a"; asked of the driver once."""
    found = _targets.get(index)
    if found is None:
        with _lock:
            if index not in _targets:
                _targets[index] = checks.target_of(torch.cuda.get_device_capability(index))
            found = _targets[index]
    return found


def plan_of(problem: AttentionProblem, device: torch.device) -> dispatch.Plan:
    """The first of the problem's plans on this device."""
    arch = target(device.index) if device.type == "cuda" else SIMULATED
    plan = _plans.get((problem, arch))
    if plan is None:
        plan = _plans[problem, arch] = dispatch.choose(problem, arch)
    return plan


@cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; on a CPU, those of the largest SM120."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 188


@contextmanager
def launches_on_cpu(load: Callable[[Problem], Callable]) -> Iterator[None]:
    """While open, CPU tensors are accepted and go to `load(problem)`, which takes a launcher's arguments. For tests."""
    global _cpu_load
    before, _cpu_load = _cpu_load, load
    calls.forget()
    try:
        yield
    finally:
        _cpu_load = before
        calls.forget()
