"""Prefill from 8-bit pages beside 16-bit ones, by how long each has the GPU to itself before the other comes.

    python benchmarks/settling.py [--seconds 0.01,0.1,1] [--cells 0,2] [--pairs 3]

The cells are those of benchmarks/prefill.py. A GPU that is at its power limit takes 10 to 100 ms to lower its clock, so
what is timed sooner is at a clock that others left. Each line: median TFLOPS over --pairs turns of each, of the second
half of a turn, their ratio, and the least and greatest ratio of the turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import cycle
from statistics import median

import torch

from flash_attn_sm120.bench import prefill
from flash_attn_sm120.bench.timing import median_ms, row_ms

LONGEST_ROW_MS = 20  # between two looks at the host's clock, at most


def turn_ms(call: Callable[..., object], inputs: list[tuple], seconds: float, seen_ms: float) -> float:
    """Median milliseconds of a call in the second half of a turn of so many seconds; it takes about seen_ms."""
    row = max(2, int(min(seconds * 1e3 / 4, LONGEST_ROW_MS) / seen_ms))
    sets, begin, found = cycle(inputs), time.monotonic(), []
    while not found or time.monotonic() - begin < seconds:
        found.append(row_ms(call, sets, row))
    return median(found[len(found) // 2 :])


def measure(number: int, durations: list[float], pairs: int) -> None:
    """Prints the cell's lines."""
    cell = prefill.CELLS[number]
    sets = [cell.inputs() for _ in range(3)]
    calls = {}
    for kind in prefill.KV_DTYPES:
        prepare, call, _ = prefill.paged(cell, prefill.PAGE_SIZE, kind, "sm120")
        calls[kind] = (call, [prepare(*tensors) for tensors in sets])
    seen = {kind: median_ms(*call, repeats=3) for kind, call in calls.items()}
    for seconds in durations:
        found: dict[str, list[float]] = {kind: [] for kind in calls}
        for turn in range(pairs):
            for kind in list(calls)[:: -1 if turn % 2 else 1]:
                found[kind].append(turn_ms(*calls[kind], seconds, seen[kind]))
        speeds = " | ".join(f"{cell.flop / median(times) / 1e9:.0f}" for times in found.values())
        bf16, e4m3 = found["bf16"], found["e4m3"]
        ratios = [before / after for before, after in zip(bf16, e4m3, strict=True)]
        print(f"| {cell.name} | {seconds:g} | {speeds} | {median(bf16) / median(e4m3):.3f} "
              f"| {min(ratios):.3f} to {max(ratios):.3f} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=lambda text: [float(s) for s in text.split(",")], default=[0.01, 0.1, 0.3, 1])
    parser.add_argument("--cells", type=lambda text: [int(i) for i in text.split(",")], default=[0, 1, 2, 3])
    parser.add_argument("--pairs", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, SM120's occupancy\n")
    print("| cell | seconds | bf16 | e4m3 | e4m3 / bf16 | of each pair |")
    print("| --- " * 6 + "|")
    for number in arguments.cells:
        measure(number, arguments.seconds, arguments.pairs)


if __name__ == "__main__":
    main()
