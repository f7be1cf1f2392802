"""Tensor copies (TMA) and bulk copies: few lanes issue them, so they go one by one.

A copy happens at once; what makes a missing wait visible is the checker: the copy's writes belong to its mbarrier's
agent, a store's reads to the issuing warp's bulk agent, and only a wait orders them before anything else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .constants import PARAM_WINDOW
from .global_memory import WORDS, MemoryFault
from .instructions_mbarrier import lanes_by_warp
from .instructions_memory import address_reader
from .parser import Instruction
from .table import unsupported

# The descriptor's element types (bytes of each) and the bits of its second word that are the same in every tiled map.
_ELEMENT_BYTES = {0: 1, 2: 4, 4: 8, 6: 2, 7: 4, 10: 2}
_FIXED_BITS, _FREE_BITS = 0x40002, 0x206000 | 0x7F0


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map, innermost dimension first: element size, sizes, byte strides of the outer dimensions, box."""

    itemsize: int
    address: int
    shape: tuple[int, ...]
    stride_bytes: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


def decode(raw: bytes) -> TensorMap | None:
    """Read a 128-byte descriptor as CuTe DSL's host code writes it; None for what isn't understood.

    Eight words of 8 bytes, the rest is unused: 0 address; 1 rank, type, swizzle, then stride 1 in units of 16 bytes;
    2 strides 2 and 3; 3 stride 4 and the strides' upper bits; 4 to 6 sizes less one; 6 (upper byte) and 7 box less one.
    """
    words = np.frombuffer(raw, "<u8", 16).tolist()
    low = words[1] & 0xFFFFFFFF
    rank, kind, swizzle = (low >> 4 & 7) + 1, low >> 7 & 15, low >> 13 & 3
    if low & ~_FREE_BITS != _FIXED_BITS or kind not in _ELEMENT_BYTES or rank > 5 or words[6] >> 32 & 0xFFFFFF:
        return None
    strides = [words[1] >> 32, words[2] & 0xFFFFFFFF, words[2] >> 32, words[3] & 0xFFFFFFFF]
    strides = [(s << 4) | ((words[3] >> 32 + 4 * i & 15) << 36) for i, s in enumerate(strides)]
    sizes = [words[4] & 0xFFFFFFFF, words[4] >> 32, words[5] & 0xFFFFFFFF, words[5] >> 32, words[6] & 0xFFFFFFFF]
    box = [words[6] >> 56] + [words[7] >> 8 * i & 255 for i in range(4)]
    return TensorMap(
        _ELEMENT_BYTES[kind], words[0], tuple(n + 1 for n in sizes[:rank]), tuple(strides[: rank - 1]),
        tuple(n + 1 for n in box[:rank]), swizzle,
    )  # fmt: skip


def bind_bulk(m, ins: Instruction):
    """Any cp.async.bulk instruction."""
    parts = ins.parts
    if parts[3] == "commit_group":
        return lambda S, mask: m.barriers.commit_bulk(m.warp_ids[S] if mask is None else m.warp_ids[S][mask.any(1)])
    if parts[3] == "wait_group":
        allowed = ins.args[0].value

        def wait(S, mask):
            m.barriers.wait_bulk(m.warp_ids[S] if mask is None else m.warp_ids[S][mask.any(1)], allowed)

        return wait
    if parts[3] == "prefetch":
        return lambda S, mask: None
    spaces = [p.split("::")[0] for p in parts if p.split("::")[0] in ("global", "shared")]
    if any("multicast" in p or p.startswith(("im2col", "cp_mask")) for p in parts) or spaces not in (
        ["shared", "global"],
        ["global", "shared"],
    ):
        raise unsupported(ins)
    tensor, load = parts[3] == "tensor", spaces[0] == "shared"
    if (load and "mbarrier::complete_tx::bytes" not in parts) or (not load and "bulk_group" not in parts):
        raise unsupported(ins)
    if tensor:
        return _tensor_load(m, ins) if load else _tensor_store(m, ins)
    return _bulk_load(m, ins) if load else _bulk_store(m, ins)


def _tensor_map(m, ins: Instruction, address: int) -> TensorMap:
    offset = address & (PARAM_WINDOW - 1)
    if address < PARAM_WINDOW or offset + 128 > len(m.params) or offset % 64:
        m.fail("bad tensor map", ins, "a tensor map must be a kernel parameter", address=address)
    if offset not in m.tensor_maps:
        m.tensor_maps[offset] = decode(m.params[offset : offset + 128])
    if m.tensor_maps[offset] is None:
        raise unsupported(ins)
    return m.tensor_maps[offset]


def box_addresses(tensor_map: TensorMap, corner: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Global byte addresses of a box's elements, innermost dimension fastest, and which of them lie in the tensor."""
    size = tensor_map.itemsize
    address, inside = np.array(tensor_map.address, np.int64), np.array(True)
    for axis, (start, extent, width) in enumerate(zip(corner, tensor_map.shape, tensor_map.box, strict=True)):
        step = size if axis == 0 else tensor_map.stride_bytes[axis - 1]
        index = start + np.arange(width, dtype=np.int64)
        shape = (width,) + (1,) * axis
        address = address + (index * step).reshape(shape)
        inside = inside & ((index >= 0) & (index < extent)).reshape(shape)
    return address.ravel(), np.broadcast_to(inside, address.shape).ravel()


def swizzled(address: np.ndarray, mode: int) -> np.ndarray:
    """Where the hardware puts a shared byte address: its bits from 4 up are exchanged by those from 7 up."""
    mask = np.uint32((1 << mode) - 1)
    return address ^ (((address >> np.uint32(7)) & mask) << np.uint32(4))


def _signed(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(v - (1 << 32) if v >> 31 else v for v in values)


def _chunks(tensor_map: TensorMap, start: int) -> np.ndarray:
    nbytes = int(np.prod(tensor_map.box)) * tensor_map.itemsize
    return swizzled(np.uint32(start) + np.arange(0, nbytes, 16, dtype=np.uint32), tensor_map.swizzle)


def _aligned(m, ins: Instruction, warp: int, address: int) -> None:
    if address % 128:
        m.fail(
            "misaligned access",
            ins,
            "a tensor copy needs 128-byte aligned shared memory",
            warp,
            None,
            address,
            "shared memory",
        )


def _deliver(m, ins: Instruction, warp: int, lane_barrier: int, target: np.ndarray, data: np.ndarray) -> None:
    """Write bytes to shared memory in 16-byte pieces as the mbarrier's agent, and count them there."""
    barrier = m.barriers.get(ins, warp, lane_barrier)
    agent, warps = m.shared.mbarrier_agent(barrier.slot), np.full(len(target), warp)
    try:
        m.shared.write(warps, target, 16, data.view(WORDS[16]), agent, barrier.phase + 1)
    except MemoryFault as error:
        m.fault(error, ins, warps, 0, target)
    m.barriers.complete_bytes(ins, warp, lane_barrier, len(data))


def _collect(m, ins: Instruction, warp: int, source: np.ndarray) -> np.ndarray:
    """Read 16-byte pieces of shared memory as the warp's bulk agent; bytes."""
    warps = np.full(len(source), warp)
    column = m.warps_per_cta + int(m.shared.local[warp])
    try:
        return m.shared.read(warps, source, 16, column, int(m.barriers.bulk_open[warp])).view(np.uint8)
    except MemoryFault as error:
        m.fault(error, ins, warps, 0, source)


def _tensor_load(m, ins: Instruction):
    target, barrier = address_reader(m, ins.args[0], "u32"), address_reader(m, ins.args[2], "u32")
    descriptor = address_reader(m, ins.args[1], "u64")
    coords = [m.read(c, "u32") for c in ins.args[1].coords]

    def step(S, mask):
        for warp, lanes in lanes_by_warp(m, S, mask, target, descriptor, barrier, *coords):
            for start, where, signal, *corner in lanes:
                tensor_map = _tensor_map(m, ins, where)
                size = tensor_map.itemsize
                _aligned(m, ins, warp, start)
                address, inside = box_addresses(tensor_map, _signed(tuple(corner)))
                data = np.zeros(len(address), WORDS[size])
                try:
                    if inside.any():
                        data[inside] = m.memory.load(address[inside].astype(np.uint64), size, m.cta_numbers(warp))
                except MemoryFault as error:
                    m.fault(error, ins, warp, 0, address[inside])
                _deliver(m, ins, warp, signal, _chunks(tensor_map, start), data.view(np.uint8))

    return step


def _tensor_store(m, ins: Instruction):
    m.shared.bulk_used = True
    source, descriptor = address_reader(m, ins.args[1], "u32"), address_reader(m, ins.args[0], "u64")
    coords = [m.read(c, "u32") for c in ins.args[0].coords]

    def step(S, mask):
        for warp, lanes in lanes_by_warp(m, S, mask, source, descriptor, *coords):
            for start, where, *corner in lanes:
                tensor_map = _tensor_map(m, ins, where)
                size = tensor_map.itemsize
                _aligned(m, ins, warp, start)
                data = _collect(m, ins, warp, _chunks(tensor_map, start)).view(WORDS[size])
                address, inside = box_addresses(tensor_map, _signed(tuple(corner)))
                try:
                    if inside.any():
                        m.memory.store(address[inside].astype(np.uint64), size, data[inside], m.cta_numbers(warp))
                except MemoryFault as error:
                    m.fault(error, ins, warp, 0, address[inside])

    return step


def _pieces(m, ins: Instruction, warp: int, start: int, nbytes: int, shared: int) -> np.ndarray:
    if nbytes % 16 or start % 16 or shared % 16:
        m.fail("misaligned access", ins, "a bulk copy needs 16-byte aligned addresses and size", warp, None, start)
    return np.arange(0, nbytes, 16)


def _bulk_load(m, ins: Instruction):
    target, source = address_reader(m, ins.args[0], "u32"), address_reader(m, ins.args[1], "u64")
    amount, barrier = m.read(ins.args[2], "u32"), address_reader(m, ins.args[3], "u32")

    def step(S, mask):
        for warp, lanes in lanes_by_warp(m, S, mask, target, source, amount, barrier):
            for start, origin, nbytes, signal in lanes:
                pieces = _pieces(m, ins, warp, origin, nbytes, start)
                address = (origin + pieces).astype(np.uint64)
                try:
                    data = m.memory.load(address, 16, m.cta_numbers(warp)).view(np.uint8)
                except MemoryFault as error:
                    m.fault(error, ins, warp, 0, address)
                _deliver(m, ins, warp, signal, (start + pieces).astype(np.uint32), data)

    return step


def _bulk_store(m, ins: Instruction):
    m.shared.bulk_used = True
    target, source = address_reader(m, ins.args[0], "u64"), address_reader(m, ins.args[1], "u32")
    amount = m.read(ins.args[2], "u32")

    def step(S, mask):
        for warp, lanes in lanes_by_warp(m, S, mask, target, source, amount):
            for start, origin, nbytes in lanes:
                pieces = _pieces(m, ins, warp, start, nbytes, origin)
                data = _collect(m, ins, warp, (origin + pieces).astype(np.uint32))
                address = (start + pieces).astype(np.uint64)
                try:
                    m.memory.store(address, 16, data.view(WORDS[16]), m.cta_numbers(warp))
                except MemoryFault as error:
                    m.fault(error, ins, warp, 0, address)

    return step
