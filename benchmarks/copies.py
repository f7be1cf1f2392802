"""Copies of this package against each other: what a change to a kernel does to prefill's time, clock and cycles.

    python benchmarks/copies.py before=/tmp/before after=. [--kinds dense,bf16,e4m3] [--cells 0,2] [--zeros]

NAME=FOLDER: a folder with a flash_attn_sm120 in it; all are loaded into one process and get the same inputs. The cells
are those of benchmarks/prefill.py. In turn: at the clock that all of them together leave. Alone: each by itself for
--seconds before it is timed for as long, with the clock that a spin on the GPU shows right behind it, and time x clock.
--zeros: K and V are zero, so that power binds nothing and kernels that give wrong results run the same way as others.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType

import torch

from flash_attn_sm120.bench.timing import in_turn_ms, settled_ms

PACKAGE = "flash_attn_sm120"
SPIN = 300_000  # cycles
LAUNCH_MS = 1.5e-3  # between a spin's events beside the spin


def load_copy(folder: Path) -> ModuleType:
    """bench.prefill of the copy in a folder, beside those of other copies that are loaded."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    try:
        importlib.invalidate_caches()
        prefill = importlib.import_module(f"{PACKAGE}.bench.prefill")
    finally:
        sys.path.pop(0)
    if not Path(prefill.__file__).is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: expected a folder with {PACKAGE} in it, got that of {prefill.__file__}")
    return prefill


def prepare(prefill: ModuleType, cell: int, kind: str, sets: list[tuple]) -> tuple[Callable, list[tuple]]:
    """(call, inputs) of a kind, dense or the type of K and V in pages, from the copy's bench.prefill."""
    if kind == "dense":
        return prefill.ours(prefill.CELLS[cell], "sm120")["ours"][1], sets
    torch.manual_seed(1)  # one page table for all copies
    to_pages, call, _ = prefill.paged(prefill.CELLS[cell], prefill.PAGE_SIZE, kind, "sm120")
    return call, [to_pages(*tensors) for tensors in sets]


def clock_ghz() -> float:
    """Of the GPU, now."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(SPIN)
    end.record()
    torch.cuda.synchronize()
    return SPIN / (start.elapsed_time(end) - LAUNCH_MS) / 1e6


def measure(copies: dict[str, ModuleType], number: int, arguments: argparse.Namespace) -> None:
    """Prints the cell's lines; ratios are to the first one."""
    cell = next(iter(copies.values())).CELLS[number]
    sets = [cell.inputs() for _ in range(3)]
    if arguments.zeros:
        for _, k, v in sets:
            k.zero_()
            v.zero_()
    calls = {
        (name, kind): prepare(copy, number, kind, sets) for name, copy in copies.items() for kind in arguments.kinds
    }
    turn, alone = in_turn_ms(calls), {}
    for name, call in calls.items():
        found = [(ms, clock_ghz()) for ms in settled_ms(*call, arguments.seconds)]
        alone[name] = tuple(map(median, zip(*found, strict=True)))
    first = next(iter(calls))
    for name, (ms, ghz) in alone.items():
        speeds = f"{cell.flop / turn[name] / 1e9:.0f} | {turn[first] / turn[name]:.3f} | {cell.flop / ms / 1e9:.0f}"
        print(f"| {cell.name} | {name[1]}, {name[0]} | {speeds} | {alone[first][0] / ms:.3f} | {ghz:.3f} "
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
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, SM120's occupancy\n")
    print("| cell | kind, copy | TFLOPS in turn | of the first | alone | of the first | GHz | Mcycles |")
    print("| --- " * 8 + "|")
    for number in arguments.cells:
        measure(copies, number, arguments)


if __name__ == "__main__":
    main()
