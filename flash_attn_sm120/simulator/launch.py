"""Launching compiled functions on the interpreter, and the context that says so."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from . import instructions  # noqa: F401  fills the table of instructions
from .global_memory import GlobalMemory, Region
from .host import HostProgram, Launch
from .lines import located
from .machine import Machine
from .report import Report, SimulationError

MAX_DYNAMIC_SMEM = 101376
ARCHS = ("sm_120a", "sm_121a")


@dataclass
class Simulation:
    """An open simulate() block: its target, options, and what has been run in it."""

    arch: str
    edit: Callable[[str], str] | None = None
    batch_warps: int = 256
    launches: list[Launch] = field(default_factory=list)
    seconds: float = 0.0


_state = threading.local()


def active() -> Simulation | None:
    """The innermost open simulate() block of this thread, or None."""
    stack = getattr(_state, "stack", None)
    return stack[-1] if stack else None


@contextmanager
def simulation(arch: str, edit: Callable[[str], str] | None = None, batch_warps: int = 256) -> Iterator[Simulation]:
    """Launches of this thread inside the block belong to the Simulation that it yields."""
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {ARCHS}, got {arch!r}")
    if not hasattr(_state, "stack"):
        _state.stack = []
    current = Simulation(arch, edit, batch_warps)
    _state.stack.append(current)
    try:
        yield current
    finally:
        _state.stack.remove(current)


def _host_program(artifact: Any, edit: Callable[[str], str] | None) -> HostProgram:
    """The artifact's host program, kept on the artifact; an edited one is made anew."""
    if edit is not None:
        return HostProgram(artifact, edit(artifact.artifacts.PTX or ""))
    program = getattr(artifact, "_simulator_host", None)
    if program is None:
        program = HostProgram(artifact)
        with suppress(AttributeError):
            artifact._simulator_host = program
    return program


def _names(artifact: Any, count: int) -> list[str]:
    """Argument names of the compiled function, as far as it knows them."""
    signature = getattr(getattr(artifact, "execution_args", None), "signature", None)
    names = [p for p in signature.parameters if p != "self"] if isinstance(signature, inspect.Signature) else []
    return (names + [f"argument {i}" for i in range(len(names), count)])[:count]


def _flat(names: Sequence[str], args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Every argument with its name; those in a tuple have its fields' names."""
    for name, value in zip(names, args, strict=True):
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", [f"{name}[{i}]" for i in range(len(value))])
            yield from _flat(fields, value)
        else:
            yield name, value


def _region(name: str, tensor: Any, output: bool = False, required: Region | None = None) -> Region:
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    return Region(name, tensor.data_ptr(), tensor.element_size(), shape, strides, output, required)


def _regions(args: Sequence[Any], names: Sequence[str], outputs: Mapping[str, Any] | None) -> list[Region]:
    regions = []
    for name, tensor in _flat(names, args):
        if hasattr(tensor, "data_ptr"):
            part = (outputs or {}).get(name)
            regions.append(_region(name, tensor, part is not None, None if part is None else _region(name, part)))
    return regions


def launch(
    artifact: Any,
    args: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    outputs: Mapping[str, Any] | None = None,
) -> None:
    """Run a compiled function on the interpreter; its real host code decides grid, shared memory and parameters.

    artifact: from cute.compile with "--enable-tvm-ffi --keep-ptx"; "--generate-line-info" adds Python lines to reports.
    args: CPU tensors, numbers, None and tuples of them in the order of the call, without the stream.
        Where it has an attribute with_lines, that makes the same function with line information, if it is needed.
    names: the arguments' names for reports; by default from the function's signature.
    outputs: name -> the tensor, or the view of it, that must be written in full; the tensor isn't read before that.
    Raises SimulationError at the first finding, UnsupportedInstruction for PTX that the interpreter doesn't know.
    """
    current = active() or Simulation("sm_120a")
    started = time.perf_counter()
    names = list(names) if names is not None else _names(artifact, len(args))
    with_lines = getattr(artifact, "with_lines", None)
    if current.edit is not None and with_lines is not None:  # what was edited has no twin
        artifact = with_lines()
    host = _host_program(artifact, current.edit)
    launches = list(host(*args))
    memory = GlobalMemory(_regions(args, names, outputs))
    for each in launches:
        _check_launch(each)
        if 0 not in each.grid:
            _interpret(host, each, memory, current.batch_warps, with_lines)
        current.launches.append(each)
    missing = memory.missing()
    if missing is not None:
        kernel = launches[-1].kernel if launches else ""
        raise SimulationError(Report("unwritten output", "no store reached this element", kernel, tensor=missing))
    current.seconds += time.perf_counter() - started


def _interpret(
    host: HostProgram, each: Launch, memory: GlobalMemory, batch_warps: int, with_lines: Callable[[], Any] | None
) -> None:
    kernel = host.kernels[each.kernel]
    machine = Machine(kernel, each.grid, each.block, each.dynamic_smem, each.params, memory, batch_warps)
    try:
        machine.run()
    except SimulationError as error:
        if with_lines is None:
            raise
        raise SimulationError(located(error.report, host.kernels, with_lines())) from None


def _check_launch(each: Launch) -> None:
    threads = each.block[0] * each.block[1] * each.block[2]
    if each.dynamic_smem > MAX_DYNAMIC_SMEM:
        message = f"{each.dynamic_smem} bytes of dynamic shared memory, at most {MAX_DYNAMIC_SMEM} fit"
        raise SimulationError(Report("invalid launch", message, each.kernel))
    if not 1 <= threads <= 1024:
        raise SimulationError(Report("invalid launch", f"{threads} threads in a CTA", each.kernel))
