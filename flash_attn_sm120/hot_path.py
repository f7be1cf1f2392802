"""The way that a warp usually takes round the main loop of compiled code."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from flash_attn_sm120.sass import Instruction, NotAvailable


@dataclass(frozen=True, slots=True)
class HotPath:
    """instructions: of one turn of the loop. rescale_slots: how many more run when O is rescaled."""

    instructions: tuple[Instruction, ...]
    rescale_slots: int


class _Loop(NamedTuple):
    header: int
    places: set[int]


class _Way(NamedTuple):
    """products, copies and slots (instructions) from a place to the end of the turn; after: the next place on it."""

    products: int
    copies: int
    slots: int
    after: int | None


def hot_path(code: list[Instruction]) -> HotPath:
    """The usual turn of the main loop, the tightest one with matrix products.

    Of all ways round, those with the most products, of these those with the most cp.async (a turn that isn't the last
    loads the next block), of these the shortest: no mask, O not rescaled, and no second look at an mbarrier.
    Raises NotAvailable where no loop has products.
    """
    order = _finished(code)
    products = {place for place, instruction in enumerate(code) if instruction.name == "HMMA"}
    loops = [loop for loop in _loops(code, order) if loop.places & products]
    if not loops:
        raise NotAvailable("no loop with HMMA")
    turns = [(loop.header, _best_ways(code, order, loop)) for loop in loops]
    # the loop with the least beside its products: one with a mask has more, and so has a loop around others
    header, best = min(turns, key=lambda turn: turn[1][turn[0]].slots / turn[1][turn[0]].products)
    path: list[int] = []
    place: int | None = header
    while place is not None:
        path.append(place)
        place = best[place].after
    return HotPath(tuple(code[place] for place in path), _rescale_slots(code, path, best))


def _rescale_slots(code: list[Instruction], path: list[int], best: dict[int, _Way]) -> int:
    """How much longer the way is through the block that the warp votes on."""
    voted = False
    for place, after in pairwise(path):
        voted = voted or code[place].name == "VOTE"
        others = [other for other in code[place].leads_to if other != after and other in best]
        if voted and others:
            return best[others[0]].slots - best[after].slots
    return 0


def _finished(code: list[Instruction]) -> list[int]:
    """Places in the order in which a depth-first search from the first leaves them."""
    order, seen = [], {0}
    stack = [(0, iter(code[0].leads_to))] if code else []
    while stack:
        place, rest = stack[-1]
        following = next((other for other in rest if other not in seen), None)
        if following is None:
            order.append(place)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(code[following].leads_to)))
    return order


def _loops(code: list[Instruction], order: list[int]) -> list[_Loop]:
    """The natural loops: a header, and all that reaches an edge back to it without passing it."""
    left = {place: i for i, place in enumerate(order)}
    before: dict[int, list[int]] = {place: [] for place in order}
    for place in order:
        for other in code[place].leads_to:
            before[other].append(place)
    loops = []
    for header in order:
        waiting = [place for place in before[header] if left[place] <= left[header]]
        if waiting:
            places = {header}
            while waiting:
                place = waiting.pop()
                if place not in places:
                    places.add(place)
                    waiting += before[place]
            loops.append(_Loop(header, places))
    return loops


def _best_ways(code: list[Instruction], order: list[int], loop: _Loop) -> dict[int, _Way]:
    """For each place of the loop, the best way from it to the end of the turn."""
    best: dict[int, _Way] = {}
    for place in order:
        if place not in loop.places:
            continue
        # an edge back to a place that isn't left yet closes an inner loop: a wait, not taken
        ways = [best[other]._replace(after=other) for other in code[place].leads_to if other in best]
        if loop.header in code[place].leads_to:
            ways.append(_Way(0, 0, 0, None))
        if ways:
            way = max(ways, key=lambda way: (way.products, way.copies, -way.slots))
            product, copy = (code[place].name == name for name in ("HMMA", "LDGSTS"))
            best[place] = _Way(way.products + product, way.copies + copy, way.slots + 1, way.after)
    return best
