"""The table of instructions: a name's first part to the function that binds it to a machine."""

from __future__ import annotations

from collections.abc import Callable

from .parser import Instruction
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


def bind(machine, ins: Instruction) -> Callable:
    """The step for an instruction."""
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
