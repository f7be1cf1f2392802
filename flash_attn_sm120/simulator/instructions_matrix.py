"""Tensor-core products and the instructions that move their fragments.

A lane's group is lane // 4, its place in the group lane % 4: fragment registers are arrays (n, 32) seen as (n, 8, 4).
"""

from __future__ import annotations

import numpy as np

from .global_memory import WORDS, MemoryFault
from .instructions_arithmetic import bf16_to_f32
from .instructions_conversion import fp8_values
from .instructions_memory import address_reader
from .parser import Instruction, Vec
from .table import operation, unsupported
from .tensor_core import multiply_add


def _elements(bits: np.ndarray, kind: str) -> np.ndarray:
    """(n, 32) words as float32 of shape (place, element of a word, group, n)."""
    n = len(bits)
    bits = np.ascontiguousarray(bits)
    if kind in ("e4m3", "e5m2"):
        values = fp8_values(kind + "x2")[bits.view(np.uint8)]
    elif kind == "bf16":
        values = bf16_to_f32(bits.view(np.uint16))
    else:
        values = bits.view(np.float16).astype(np.float32)
    return values.reshape(n, 8, 4, -1).transpose(2, 3, 1, 0)


_SHAPES = {"m16n8k16": ("bf16", "f16"), "m16n8k8": ("bf16", "f16"), "m16n8k32": ("e4m3", "e5m2")}


def _operand(registers: list[np.ndarray], kind: str, halves: int) -> np.ndarray:
    """(k, rows, n) of A, whose rows have two halves, or (k, columns, n) of B, with one: k in the order of _elements."""
    parts = [_elements(bits, kind) for bits in registers]
    place, element, group, n = parts[0].shape
    out = np.empty((len(parts) // halves, place, element, halves, group, n), np.float32)
    for i, part in enumerate(parts):
        out[i // halves, :, :, i % halves] = part
    return out.reshape(-1, halves * group, n)


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
    kind_a, kind_b = _check(ins)
    if len(ins.args) != 4 or any(not isinstance(a, Vec) for a in ins.args):
        raise unsupported(ins)
    reads_a = [m.read(r, np.uint32) for r in ins.args[1].items]
    reads_b = [m.read(r, np.uint32) for r in ins.args[2].items]
    reads_c = [m.read(r, np.float32) for r in ins.args[3].items]
    writes = [m.write(r, np.float32) for r in ins.args[0].items]

    def step(S, mask):
        S = m.whole_warps(ins, S, mask)
        a = _operand([r(S) for r in reads_a], kind_a, 2)
        b = _operand([r(S) for r in reads_b], kind_b, 1)
        # (row half, group, place, column of a pair, n)
        c = np.empty((2, 8, 4, 2, a.shape[-1]), np.float32)
        for i, read in enumerate(reads_c):
            c[i // 2, :, :, i % 2] = read(S).T.reshape(8, 4, -1)
        d = multiply_add(a, b, c.reshape(16, 8, -1)).reshape(c.shape)
        for i, store in enumerate(writes):
            store(S, None, d[i // 2, :, :, i % 2].reshape(32, -1).T)

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
