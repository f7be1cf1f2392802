"""Copies of this package against each other: what a change to a kernel does to prefill's time, clock and cycles.

    python benchmarks/copies.py before=/tmp/before after=. [--kinds dense,bf16,e4m3] [--cells 0,2] [--zeros]

NAME=FOLDER: a folder with a flash_attn_sm120 in it; all are loaded into one process and get the same inputs. The cells
are those of benchmarks/prefill.py. In turn: call by call in random order, at one clock. Alone: each by itself for
--seconds before it is timed for as long, with the clock that a spin on the GPU shows right behind it, and time x clock.
--zeros: K and V are zero, so that power binds nothing and kernels that give wrong results run the same way as others.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = "flash_attn_sm120"
SPIN = 300_000  # cycles
LAUNCH_MS = 1.5e-3  # between a spin's events beside the spin
TURNS = 60


def load_copy(folder: Path) -> tuple[ModuleType, ModuleType]:
    """bench.prefill and bench.forward of the copy in a folder, beside those of other copies that are loaded."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    try:
        importlib.invalidate_caches()
        found = tuple(importlib.import_module(f"{PACKAGE}.bench.{name}") for name in ("prefill", "forward"))
    finally:
        sys.path.pop(0)
    if not Path(found[0].__file__).is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: expected a folder with {PACKAGE} in it, got that of {found[0].__file__}")
    return found


def prepare(copy: tuple[ModuleType, ModuleType], cell, kind: str, sets: list[tuple], zeros: bool) -> tuple:
    """(call, inputs) of a kind: dense, or the type of K and V in pages."""
    prefill, forward = copy
    own = forward.Cell(cell.batch, cell.seqlen, heads=cell.heads, heads_kv=cell.heads_kv, mask=cell.mask)
    if kind == "dense":
        call, inputs = forward.ours(own, "sm120")["ours"][1], [tuple(x.clone() for x in tensors) for tensors in sets]
    else:
        torch.manual_seed(1)  # one page table for all copies
        to_pages, call, _ = prefill.paged(own, prefill.PAGE_SIZE, kind, "sm120")
        inputs = [to_pages(*tensors) for tensors in sets]
    if zeros:
        for _, *keys_and_values in inputs:
            for tensor in keys_and_values:
                tensor.view(torch.int8).zero_()
    call(*inputs[0])  # compiles
    return call, inputs


def timed(action: Callable[[], object]) -> Callable[[], float]:
    """Does it now; milliseconds, once the GPU is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    return lambda: start.elapsed_time(end)


def in_turn_ms(calls: dict) -> dict:
    found: dict = {name: [] for name in calls}
    for turn in range(TURNS):
        order = random.sample(list(calls), len(calls))
        running = [(name, timed(partial(calls[name][0], *calls[name][1][turn % 3]))) for name in order]
        torch.cuda.synchronize()
        if turn >= TURNS // 10:
            for name, ms in running:
                found[name].append(ms())
    return {name: statistics.median(times) for name, times in found.items()}


def alone(call: Callable, inputs: list[tuple], row: int, seconds: float) -> tuple[float, float]:
    """(median milliseconds of a call, GHz) of rows of calls, from `seconds` after the first on, for as long."""
    sets, found, begin = cycle(inputs), [], time.monotonic()
    while time.monotonic() < begin + 2 * seconds or not found:
        ms = timed(lambda: [call(*tensors) for tensors in islice(sets, row)])
        spin = timed(lambda: torch.cuda._sleep(SPIN))
        torch.cuda.synchronize()
        if time.monotonic() > begin + seconds:
            found.append((ms() / row, SPIN / (spin() - LAUNCH_MS) / 1e6))
    return tuple(statistics.median(values) for values in zip(*found, strict=True))


def measure(copies: dict, cell, arguments: argparse.Namespace) -> None:
    """Prints the cell's lines; ratios are to the first one."""
    sets = [cell.inputs() for _ in range(3)]
    calls = {
        (name, kind): prepare(copy, cell, kind, sets, arguments.zeros)
        for name, copy in copies.items()
        for kind in arguments.kinds
    }
    turn = in_turn_ms(calls)
    single = {}
    for name in random.sample(list(calls), len(calls)):
        single[name] = alone(*calls[name], max(2, round(20 / turn[name])), arguments.seconds)
    first = next(iter(calls))
    for name in calls:
        ms, ghz = single[name]
        speeds = f"{cell.flop / turn[name] / 1e9:.0f} | {turn[first] / turn[name]:.3f} | {cell.flop / ms / 1e9:.0f}"
        print(f"| {cell.name} | {name[1]}, {name[0]} | {speeds} | {single[first][0] / ms:.3f} | {ghz:.3f} "
              f"| {ms * ghz:.3f} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("copies", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=["bf16", "e4m3"])
    parser.add_argument("--cells", type=lambda text: [int(i) for i in text.split(",")], default=[0, 1, 2, 3])
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--zeros", action="store_true")
    arguments = parser.parse_args()
    if bad := [text for text in arguments.copies if "=" not in text]:
        parser.error(f"argument NAME=FOLDER: expected a name, = and a folder, got {bad[0]!r}")
    copies = {name: load_copy(Path(folder)) for name, _, folder in (text.partition("=") for text in arguments.copies)}
    cells = next(iter(copies.values()))[0].CELLS
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, SM120's occupancy\n")
    print("| cell | kind, copy | TFLOPS in turn | of the first | alone | of the first | GHz | Mcycles |")
    print("| --- " * 8 + "|")
    for i in arguments.cells:
        measure(copies, cells[i], arguments)


if __name__ == "__main__":
    main()
