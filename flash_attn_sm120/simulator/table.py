"""The table of instructions: a name's first part to the function that binds it to a machine."""

from __future__ import annotations

from collections.abc import Callable

from .parser import Instruction, Reg
from .report import UnsupportedInstruction

BINDERS: dict[str, Callable] = {}
CONTROL: dict[str, Callable] = {}
_BLOCK_STARTERS = ("try_wait", "test_wait")


def operation(*names: str) -> Callable:
    """Register bind(machine, instruction) -> step(selection, mask) for instructions that begin with one of `names`."""

    def add(bind: Callable) -> Callable:
        BINDERS.update(dict.fromkeys(names, bind))
        return bind

    return add


def control(*names: str) -> Callable:
    """Register bind(machine, instruction, next_block) for instructions that end a basic block and set the counters."""

    def add(bind: Callable) -> Callable:
        CONTROL.update(dict.fromkeys(names, bind))
        return bind

    return add


def unsupported(ins: Instruction) -> UnsupportedInstruction:
    return UnsupportedInstruction(f"PTX line {ins.line}: {ins.text}")


def expect_parts(ins: Instruction, count: int) -> None:
    """Refuse modifiers beyond those that the binder reads."""
    if len(ins.parts) != count:
        raise unsupported(ins)


def _waits(ins: Instruction) -> bool:
    return ins.parts[0] == "mbarrier" and ins.parts[1] in _BLOCK_STARTERS


def ends_block(ins: Instruction) -> bool:
    """Whether control may leave after this instruction."""
    if ins.op == "bar.warp.sync":
        return False
    return ins.parts[0] in CONTROL or _waits(ins)


def starts_block(ins: Instruction) -> bool:
    """Whether a warp may have to come back to this instruction."""
    return _waits(ins)


def bind(machine, ins: Instruction | tuple[Instruction, ...]) -> Callable:
    """The step for an instruction or for a run of products that were fused."""
    if isinstance(ins, tuple):
        return _bound(BINDERS["fused mma"], ins[0], machine, ins)
    return _bound(BINDERS.get(ins.parts[0]), ins, machine, ins)


def bind_control(machine, ins: Instruction, after: int) -> Callable:
    """The step for an instruction that ends a block."""
    return _bound(CONTROL["mbarrier wait" if _waits(ins) else ins.parts[0]], ins, machine, ins, after)


def _bound(binder: Callable | None, ins: Instruction, *args) -> Callable:
    """Call a binder; whatever it doesn't understand becomes a refusal with the instruction's text."""
    if binder is None:
        raise unsupported(ins)
    try:
        return binder(*args)
    except (KeyError, IndexError, AttributeError, ValueError, UnsupportedInstruction) as error:
        if isinstance(error, UnsupportedInstruction) and ins.text in str(error):
            raise
        raise UnsupportedInstruction(f"PTX line {ins.line}: {ins.text} ({error})") from error


def shared_width(ins: Instruction) -> int:
    """Bytes of the narrowest piece that a shared access touches; 16 for instructions that touch none."""
    parts = ins.parts
    if parts[0] in ("ld", "st") and any(p.startswith("shared") for p in parts):
        return _access_bytes(parts)
    if parts[0] in ("ld", "st") and not any(p in ("global", "param", "local", "const") for p in parts):
        return _access_bytes(parts)
    if parts[:2] == ("cp", "async") and "bulk" not in parts and "shared" in ins.op and len(ins.args) > 2:
        return min(ins.args[2].value, 16)
    if parts[0] in ("atom", "red") and "shared" in ins.op:
        return _access_bytes(parts)
    return 16


def _access_bytes(parts: tuple[str, ...]) -> int:
    bits = int("".join(c for c in parts[-1] if c.isdigit()))
    count = next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)
    return min(bits // 8 * count, 16)


def _overlaps(group: list[Instruction], ins: Instruction) -> bool:
    written = {r.name for each in group for r in each.args[0].items if isinstance(r, Reg)}
    return any(r.name in written for vec in ins.args for r in vec.items if isinstance(r, Reg))


def fuse(instructions: list[Instruction]) -> list[Instruction | tuple[Instruction, ...]]:
    """Join runs of mma with the same A operand and independent accumulators into one step, a tuple."""
    out: list = []
    run: list[Instruction] = []

    def flush() -> None:
        if run:
            out.append(tuple(run) if len(run) > 1 else run[0])
            run.clear()

    for ins in instructions:
        if ins.parts[0] != "mma" or ins.guard is not None:
            flush()
            out.append(ins)
            continue
        if run and (ins.op != run[0].op or ins.args[1] != run[0].args[1] or _overlaps(run, ins)):
            flush()
        run.append(ins)
    flush()
    return out
