"""What is known of a call from the form of its arguments (shapes, strides, dtypes, options), kept from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flash_attn_sm120.arguments import Numbers

MAX_CALLS = 4096  # kept; a server sees few, a sweep over lengths starts anew


class Call(NamedTuple):
    """What all calls with the same arguments but for addresses and contents have in common; checked once."""

    launcher: Callable | None  # None: there is nothing to compute
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...] | None
    numbers: Numbers
    readable: bool  # q, k and v have strides that the kernel can follow
    writable: bool  # out, if given, has
    reaches: tuple[int, ...]  # bytes that q, k, v and out extend over, where out is given
    device_index: int | None


known: dict[tuple, Call] = {}


def remember(key: tuple, call: Call) -> None:
    if len(known) >= MAX_CALLS:
        known.clear()
    known[key] = call


def forget() -> None:
    known.clear()
