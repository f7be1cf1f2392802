"""Timing on a GPU: CUDA events, warm-up, medians, and several input sets in turn so that L2 is not measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from statistics import mean, median
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


def alone_ms(
    timed: dict[Key, tuple[Callable[..., object], list[tuple]]], seconds: float = 0.5, rounds: int = 2
) -> dict[Key, float]:
    """Median milliseconds of each (call, inputs) by itself, as settled_ms has them. The mean over `rounds`, of which
    every other has the order turned round."""
    found: dict[Key, list[float]] = {name: [] for name in timed}
    order = list(timed)
    for _ in range(rounds):
        for name in order:
            found[name].append(median(settled_ms(*timed[name], seconds)))
        order.reverse()
    return {name: mean(times) for name, times in found.items()}


def settled_ms(call: Callable[..., object], inputs: list[tuple], seconds: float = 0.5) -> Iterator[float]:
    """Milliseconds of a call in rows of some 20 ms, one row after the other, for `seconds` from when it has run by
    itself for as long: by then the GPU has the clock that the call's own power leaves it, as in a server that runs one
    model, not the one that others left."""
    row = max(2, round(20 / median_ms(call, inputs, repeats=3, warm_up=1)))
    sets, begin, passed = cycle(inputs), time.monotonic(), 0.0
    while passed <= 2 * seconds:
        ms = row_ms(call, sets, row)
        passed = time.monotonic() - begin
        if passed > seconds:
            yield ms


def row_ms(call: Callable[..., object], sets: Iterator[tuple], count: int) -> float:
    """Milliseconds of a call in a row of `count`, timed as a whole, on the next of the input sets."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for tensors in islice(sets, count):
        call(*tensors)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count
