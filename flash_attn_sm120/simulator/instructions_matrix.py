"""Tensor-core products and the instructions that move their fragments.

A lane's group is lane // 4, its place in the group lane % 4: fragment registers are arrays (n, 32) seen as (n, 8, 4).
"""

from __future__ import annotations

import numpy as np

from .global_memory import WORDS, MemoryFault
from .instructions_conversion import fp8_values
from .instructions_memory import address_reader
from .parser import Instruction, Vec
from .table import operation, unsupported


def _halves(bits: np.ndarray, kind: str) -> np.ndarray:
    """(n, 32) words as float32 of shape (n, 8, 4, elements in a word)."""
    n = len(bits)
    if kind in ("e4m3", "e5m2"):
        table = fp8_values(kind + "x2")
        return table[np.ascontiguousarray(bits).view(np.uint8).reshape(n, 8, 4, 4)]
    pairs = np.ascontiguousarray(bits).view(np.uint16).reshape(n, 8, 4, 2)
    if kind == "bf16":
        return (pairs.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return pairs.view(np.float16).astype(np.float32)


_SHAPES = {"m16n8k16": ("bf16", "f16"), "m16n8k8": ("bf16", "f16"), "m16n8k32": ("e4m3", "e5m2")}


def _a_matrix(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """(n, 16, k): rows in order, k in the order (lane place, k half, element) that _b_matrix shares."""
    n, halves = len(registers[0]), len(registers) // 2
    per_word = 4 if kind.startswith("e") else 2
    out = np.empty((n, 2, 8, 4, halves, per_word), np.float32)
    for i, bits in enumerate(registers):
        out[:, i % 2, :, :, i // 2] = _halves(bits, kind)
    return out.reshape(n, 16, -1)


def _b_matrix(tiles: list[list[np.ndarray]], kind: str) -> np.ndarray:
    """(n, k, 8 * tiles): columns of all tiles side by side."""
    n, halves = len(tiles[0][0]), len(tiles[0])
    per_word = 4 if kind.startswith("e") else 2
    out = np.empty((n, len(tiles), 8, 4, halves, per_word), np.float32)
    for t, registers in enumerate(tiles):
        for i, bits in enumerate(registers):
            out[:, t, :, :, i] = _halves(bits, kind)
    return out.reshape(n, len(tiles) * 8, -1).transpose(0, 2, 1)


def _check(ins: Instruction) -> tuple[str, str]:
    parts = tuple(p for p in ins.parts if p != "kind::f8f6f4")
    if parts[1:3] != ("sync", "aligned") or parts[4:6] != ("row", "col") or len(parts) != 10:
        raise unsupported(ins)
    shape, (out, a, b, c) = parts[3], parts[6:]
    if shape not in _SHAPES or a not in _SHAPES[shape] or b not in _SHAPES[shape] or (out, c) != ("f32", "f32"):
        raise unsupported(ins)
    return a, b


@operation("mma")
def _mma(m, ins: Instruction):
    return _fused_mma(m, (ins,))


@operation("fused mma")
def _fused_mma(m, group: tuple[Instruction, ...]):
    """d = a @ b + c for instructions that share a: one product with the b tiles side by side, float32 accumulation."""
    first = group[0]
    kind_a, kind_b = _check(first)
    reads_a = [m.read(r, np.uint32) for r in first.args[1].items]
    reads_b = [[m.read(r, np.uint32) for r in ins.args[2].items] for ins in group]
    reads_c = [[m.read(r, np.float32) for r in ins.args[3].items] for ins in group]
    writes = [[m.write(r, np.float32) for r in ins.args[0].items] for ins in group]
    if len(first.args) != 4 or any(not isinstance(a, Vec) for a in first.args):
        raise unsupported(first)

    def step(S, mask):
        S = m.whole_warps(first, S, mask)
        a = _a_matrix([r(S) for r in reads_a], kind_a)
        b = _b_matrix([[r(S) for r in tile] for tile in reads_b], kind_b)
        n = len(a)
        # (n, row half, group, tile, place, column of a pair)
        product = np.matmul(a, b).reshape(n, 2, 8, len(group), 4, 2)
        for t, (accumulators, stores) in enumerate(zip(reads_c, writes, strict=True)):
            for i, (c, store) in enumerate(zip(accumulators, stores, strict=True)):
                part = product[:, i // 2, :, t, :, i % 2].reshape(n, 32)
                store(S, None, part + c(S))

    return step


def _check_matrices(ins: Instruction) -> None:
    rest = [p for p in ins.parts[5:-1] if p != "trans"]
    if (
        ins.parts[1:4] != ("sync", "aligned", "m8n8")
        or rest not in (["shared"], ["shared::cta"])
        or ins.parts[-1] != "b16"
    ):
        raise unsupported(ins)


@operation("ldmatrix")
def _ldmatrix(m, ins: Instruction):
    """Lane l gives row l % 8 of matrix l // 8; register i receives matrix i, transposed with .trans."""
    parts = ins.parts
    _check_matrices(ins)
    trans, count = "trans" in parts, {"x1": 1, "x2": 2, "x4": 4}[parts[4]]
    address = address_reader(m, ins.args[1], "u32")
    destinations = ins.args[0].items if isinstance(ins.args[0], Vec) else (ins.args[0],)
    writes = [m.write(r, np.uint32) for r in destinations]
    if len(writes) != count:
        raise unsupported(ins)

    def step(S, mask):
        S = m.whole_warps(ins, S, mask)
        where = address(S)[:, : 8 * count]
        warps, lanes = m.warp_ids[S][:, None], m.lanes[None, : 8 * count]
        try:
            rows = m.shared.read(warps, where, 16)
        except MemoryFault as error:
            m.fault(error, ins, warps, lanes, where)
        n = len(rows)
        if trans:
            halves = rows[..., None].view(np.uint16).reshape(n, count, 8, 8)
            words = np.ascontiguousarray(halves.swapaxes(2, 3)).view(np.uint32)
        else:
            words = rows[..., None].view(np.uint32)
        words = words.reshape(n, count, 32)
        for i, store in enumerate(writes):
            store(S, None, words[:, i])

    return step


@operation("stmatrix")
def _stmatrix(m, ins: Instruction):
    """The inverse of ldmatrix."""
    parts = ins.parts
    _check_matrices(ins)
    trans, count = "trans" in parts, {"x1": 1, "x2": 2, "x4": 4}[parts[4]]
    address = address_reader(m, ins.args[0], "u32")
    sources = ins.args[1].items if isinstance(ins.args[1], Vec) else (ins.args[1],)
    reads = [m.read(r, np.uint32) for r in sources]

    def step(S, mask):
        S = m.whole_warps(ins, S, mask)
        where = address(S)[:, : 8 * count]
        warps, lanes = m.warp_ids[S][:, None], m.lanes[None, : 8 * count]
        words = np.stack([r(S) for r in reads], axis=1)
        n = len(words)
        if trans:
            halves = words.view(np.uint16).reshape(n, count, 8, 8)
            words = np.ascontiguousarray(halves.swapaxes(2, 3)).view(np.uint32)
        rows = np.ascontiguousarray(words).view(WORDS[16]).reshape(n, 8 * count)
        try:
            m.shared.write(warps, where, 16, rows)
        except MemoryFault as error:
            m.fault(error, ins, warps, lanes, where)

    return step


@operation("movmatrix")
def _movmatrix(m, ins: Instruction):
    if ins.parts[1:] != ("sync", "aligned", "m8n8", "trans", "b16"):
        raise unsupported(ins)
    read, store = m.read(ins.args[1], np.uint32), m.write(ins.args[0], np.uint32)

    def step(S, mask):
        S = m.whole_warps(ins, S, mask)
        halves = np.ascontiguousarray(read(S)).view(np.uint16).reshape(-1, 8, 8)
        store(S, None, np.ascontiguousarray(halves.swapaxes(1, 2)).view(np.uint32).reshape(-1, 32))

    return step
