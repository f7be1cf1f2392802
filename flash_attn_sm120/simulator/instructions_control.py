"""Branches, barriers, votes and shuffles."""

from __future__ import annotations

import numpy as np

from .constants import EXIT
from .parser import Instruction, Pair
from .table import control, expect_parts, operation, unsupported


@control("bra")
def _bra(m, ins: Instruction, after: int):
    if set(ins.parts[1:]) - {"uni"}:
        raise unsupported(ins)
    target = m.target(ins.args[0])
    if ins.guard is None:
        return lambda S, mask: m.advance(S, mask, target)
    predicate = m.read(ins.guard, "pred")

    def jump(S, mask):
        p = predicate(S)
        if mask is None:
            if p.all():
                m.advance(S, None, target)
            elif not p.any():
                m.advance(S, None, after)
            else:
                m.set_pc(S, np.where(p, target, after))
        else:
            m.set_pc(S, np.where(mask, np.where(p, target, after), m.pc[S]))

    return jump


@control("ret", "exit")
def _exit(m, ins: Instruction, after: int):
    predicate = m.read(ins.guard, "pred") if ins.guard is not None else None

    def leave(S, mask):
        if predicate is None:
            m.advance(S, mask, EXIT)
        else:
            p = predicate(S)
            target = np.where(p, EXIT, after)
            m.set_pc(S, target if mask is None else np.where(mask, target, m.pc[S]))
        m.barriers.exited(m.warp_ids[S])

    return leave


@control("trap")
def _trap(m, ins: Instruction, after: int):
    predicate = m.read(ins.guard, "pred") if ins.guard is not None else None

    def stop(S, mask):
        hit = np.ones((len(m.warp_ids[S]), 32), bool) if predicate is None else predicate(S)
        hit = hit if mask is None else hit & mask
        if hit.any():
            row, lane = np.argwhere(hit)[0]
            m.fail("trap", ins, "the kernel stopped itself", int(m.warp_ids[S][row]), int(lane))
        m.advance(S, mask, after)

    return stop


@control("bar", "barrier")
def _bar(m, ins: Instruction, after: int):
    parts = [p for p in ins.parts[1:] if p not in ("cta", "aligned")]
    if parts not in (["sync"], ["arrive"]) or ins.guard is not None:
        raise unsupported(ins)
    waits = parts == ["sync"]
    identity = m.read(ins.args[0], "u32")
    threads = m.read(ins.args[1], "u32") if len(ins.args) > 1 else None

    def step(S, mask):
        warps = m.warp_ids[S]
        if mask is not None:
            count = mask.sum(axis=1)
            alive = (m.pc[S] < EXIT).sum(axis=1)
            partial = (count > 0) & (count < alive)
            if partial.any():
                row = int(np.argmax(partial))
                lane = int(np.argmin(mask[row]))
                m.fail(
                    "divergent barrier", ins, "some lanes of the warp don't reach the barrier", int(warps[row]), lane
                )
        one = np.broadcast_to(identity(S), (len(warps), 32))[:, 0]
        many = np.broadcast_to(threads(S), (len(warps), 32))[:, 0] if threads else None
        m.advance(S, mask, after)
        m.barriers.arrive(ins, warps, one, many, waits)

    return step


@operation("bar")
def _warp_sync(m, ins: Instruction):
    if ins.op != "bar.warp.sync":
        raise unsupported(ins)
    return lambda S, mask: None


@operation("shfl")
def _shfl(m, ins: Instruction):
    """Each lane reads another lane's value; beyond its segment it reads its own, and the predicate is false."""
    if ins.parts[1] != "sync" or ins.parts[-1] != "b32":
        raise unsupported(ins)
    expect_parts(ins, 4)
    mode = ins.parts[2]
    if mode not in ("up", "down", "bfly", "idx"):
        raise unsupported(ins)
    destination, found = ins.args[0], None
    if isinstance(destination, Pair):
        destination, found = destination.first, m.write(destination.second, "pred")
    store, value = m.write(destination, "b32"), m.read(ins.args[1], "b32")
    b, c = m.read(ins.args[2], "u32"), m.read(ins.args[3], "u32")
    lanes = m.lanes.astype(np.int64)[None, :]

    def step(S, mask):
        S = m.whole_warps(ins, S, mask)
        rows = np.broadcast_to(value(S), (len(m.warp_ids[S]), 32))
        clamp_segment = np.asarray(c(S)).astype(np.int64)
        offset, clamp, segment = np.asarray(b(S)).astype(np.int64) & 31, clamp_segment & 31, clamp_segment >> 8 & 31
        high = (lanes & segment) | (clamp & ~segment)
        low = lanes & segment
        if mode == "up":
            source, limit = lanes - offset, None
            inside = source >= high
        else:
            source = {"down": lanes + offset, "bfly": lanes ^ offset, "idx": low | (offset & ~segment)}[mode]
            limit = high
            inside = source <= limit
        source = np.broadcast_to(np.where(inside, source, lanes), rows.shape)
        store(S, None, np.take_along_axis(rows, source, axis=1))
        if found:
            found(S, None, np.broadcast_to(inside, rows.shape))

    return step


def _members(m, operand, S, mask) -> np.ndarray:
    """Lanes that take part: the member mask, and active."""
    bits = np.broadcast_to(np.asarray(operand(S)), (len(m.warp_ids[S]), 32))
    taken = (bits >> m.lanes.astype(np.uint32)) & np.uint32(1) != 0
    return taken if mask is None else taken & mask


@operation("vote", "elect", "activemask", "redux", "match")
def _vote(m, ins: Instruction):
    name = ins.parts[0]
    if name == "elect":
        return _elect(m, ins)
    if name == "activemask":
        store = m.write(ins.args[0], "b32")
        weights = np.uint32(1) << m.lanes.astype(np.uint32)

        def active(S, mask):
            on = np.ones((len(m.warp_ids[S]), 32), bool) if mask is None else mask
            store(S, mask, (on * weights).sum(axis=1, dtype=np.uint32)[:, None])

        return active
    if name == "redux":
        return _redux(m, ins)
    if name != "vote" or ins.parts[1] != "sync":
        raise unsupported(ins)
    expect_parts(ins, 4)
    mode = ins.parts[2]
    predicate, members = m.read(ins.args[1], "pred"), m.read(ins.args[2], "u32")
    store = m.write(ins.args[0], "b32" if mode == "ballot" else "pred")

    def step(S, mask):
        taken = _members(m, members, S, mask)
        p = np.broadcast_to(predicate(S), taken.shape)
        if mode == "ballot":
            bits = (p & taken) * (np.uint32(1) << m.lanes.astype(np.uint32))
            result = bits.sum(axis=1, dtype=np.uint32)
        elif mode == "all":
            result = (p | ~taken).all(axis=1)
        elif mode == "any":
            result = (p & taken).any(axis=1)
        else:
            result = (p | ~taken).all(axis=1) | ~(p & taken).any(axis=1)
        store(S, mask, np.broadcast_to(result[:, None], taken.shape))

    if mode not in ("ballot", "all", "any", "uni"):
        raise unsupported(ins)
    return step


def _redux(m, ins: Instruction):
    fn = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}.get(
        ins.parts[2]
    )
    expect_parts(ins, 4)
    dtype = ins.parts[-1]
    if fn is None or dtype not in ("s32", "u32", "b32"):
        raise unsupported(ins)
    read, store = m.read(ins.args[1], dtype), m.write(ins.args[0], dtype)

    def step(S, mask):
        S = m.whole_warps(ins, S, mask)
        values = np.broadcast_to(read(S), (len(m.warp_ids[S]), 32))
        store(S, None, fn.reduce(values, axis=1, dtype=values.dtype)[:, None])

    return step


def _elect(m, ins: Instruction):
    """elect.sync d|p, members: p is true in the lowest member lane."""
    store, chosen = m.write(ins.args[0].first, "b32"), m.write(ins.args[0].second, "pred")
    members = m.read(ins.args[1], "u32")

    def step(S, mask):
        taken = _members(m, members, S, mask)
        leader = taken.argmax(axis=1)[:, None]
        store(S, mask, np.broadcast_to(leader.astype(np.uint32), taken.shape))
        chosen(S, mask, m.lanes[None, :] == leader)

    return step


@operation(
    "membar",
    "griddepcontrol",
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "setmaxnreg",
    "nanosleep",
)
def _nothing(m, ins: Instruction):
    """Ordering, hints and power: memory here is sequentially consistent, so nothing is left to do."""
    return lambda S, mask: None


@operation("fence")
def _fence(m, ins: Instruction):
    """Only a proxy fence changes something: it shows the warp's writes to the asynchronous engine."""
    if ins.parts[1:3] != ("proxy", "async"):
        return lambda S, mask: None
    return lambda S, mask: m.shared.fence(m.warp_ids[S] if mask is None else m.warp_ids[S][mask.any(axis=1)])


@operation("clusterlaunchcontrol", "createpolicy")
def _unknown(m, ins: Instruction):
    if ins.parts[0] == "createpolicy":
        store = m.write(ins.args[0], "b64")
        return lambda S, mask: store(S, mask, np.uint64(0))
    raise unsupported(ins)
