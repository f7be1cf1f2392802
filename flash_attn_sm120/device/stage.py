"""Room in shared memory for a tile of K and one of V, and the mbarriers that say when it is full or free."""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import Int32, cute

BARRIERS = ("k_full", "k_free", "v_full", "v_free")


@dataclass(frozen=True)
class Stage:
    """shared: what offset_k and offset_v are added to. turn: how often the room was filled before."""

    shared: Int32
    bars: dict[str, cute.Pointer]
    turn: int | Int32

    def wait_for_k(self) -> None:
        cute.arch.mbarrier_wait(self.bars["k_full"], self.turn & 1)

    def wait_for_v(self) -> None:
        cute.arch.mbarrier_wait(self.bars["v_full"], self.turn & 1)

    def wait_for_k_room(self) -> None:
        cute.arch.mbarrier_wait(self.bars["k_free"], (self.turn & 1) ^ 1)

    def wait_for_v_room(self) -> None:
        cute.arch.mbarrier_wait(self.bars["v_free"], (self.turn & 1) ^ 1)


def stage_of(i: int | Int32, stages: int, stage_bytes: int, shared: Int32, barriers: cute.Pointer) -> Stage:
    """Where the i-th block's K and V lie. stages: a power of two, stage_bytes apart from `shared` on; their mbarriers
    follow one another."""
    number = i & stages - 1 if stages > 1 else 0
    first = barriers + number * len(BARRIERS)
    bars = {name: first + j for j, name in enumerate(BARRIERS)}
    return Stage(shared + number * stage_bytes, bars, i >> stages.bit_length() - 1)
