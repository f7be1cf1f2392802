"""Timing on a GPU: CUDA events, warm-up, medians, and several input sets in turn so that L2 is not measured."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from statistics import median
from typing import TypeVar

import torch

Key = TypeVar("Key")


def median_ms(call: Callable[..., object], inputs: list[tuple], repeats: int = 20, warm_up: int = 5) -> float:
    """Median milliseconds of call(*inputs[i]), the input sets taken in turn."""
    sets = cycle(inputs)
    for _ in range(warm_up):
        call(*next(sets))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        call(*next(sets))
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in pairs)


def in_turn_ms(
    timed: dict[Key, tuple[Callable[..., object], list[tuple]]], turns: int = 7, repeats: int = 5
) -> dict[Key, float]:
    """Median milliseconds of each (call, inputs), in rows of `repeats` one after the other and again from the first: a
    GPU slows down as it gets warm."""
    found: dict[Key, list[float]] = {name: [] for name in timed}
    for _ in range(turns):
        for name, (call, inputs) in timed.items():
            found[name].append(median_ms(call, inputs, repeats=repeats, warm_up=2))
    return {name: median(times) for name, times in found.items()}
