"""PTX text to a program: kernels with their parameters, registers, shared variables and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from .report import UnsupportedInstruction

_TYPE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


@dataclass(frozen=True)
class Reg:
    """A register (general or predicate); `negated` for !%p."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """A read-only register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Imm:
    """A literal: kind 'int' (value), 'f32' or 'f64' (value holds the bits)."""

    kind: str
    value: int


@dataclass(frozen=True)
class Sym:
    """A variable's address, a parameter or a label, plus a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    """{a, b, ...}"""

    items: tuple


@dataclass(frozen=True)
class Mem:
    """[base + offset] and, for tensor copies, [base, {coordinates}]."""

    base: object
    offset: int = 0
    coords: tuple | None = None


@dataclass(frozen=True)
class Pair:
    """a|b: a destination and the predicate beside it."""

    first: object
    second: object


@dataclass
class Instruction:
    """One decoded line: `op` is the full dotted name, `parts` its pieces, `guard` the @p that stands before it."""

    op: str
    parts: tuple[str, ...]
    args: tuple
    guard: Reg | None
    line: int
    text: str
    source: str | None = None
    index: int = 0


@dataclass
class Param:
    name: str
    offset: int
    size: int


@dataclass
class Variable:
    """A .shared or .local array; size 0 means that the launch gives it (dynamic shared memory)."""

    name: str
    space: str
    align: int
    size: int


@dataclass
class Kernel:
    name: str
    params: list[Param]
    param_bytes: int
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    reqntid: tuple[int, ...] | None = None


def _strip_comments(text: str) -> str:
    """Blank comments out, newlines kept, so that line numbers stay true."""

    def blank(match: re.Match) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)


def _split_top(text: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, ch in enumerate(text):
        if ch in "{[(":
            depth += 1
        elif ch in "}])":
            depth -= 1
        elif ch == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts


def _int(text: str) -> int:
    text = text.rstrip("U")
    return int(text, 0) if not re.fullmatch(r"-?0[0-7]+", text) else int(text, 8)


_VARIABLE = re.compile(
    r"(?:\.extern\s+)?\.(shared|local|global)\s+(?:\.align\s+(\d+)\s+)?\.[busf](\d+)\s+([$\w]+)\s*(\[(\d*)\])?"
)
_PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([a-z]+)(\d+)\s*(?:\.ptr[^,]*?)?\s*([$\w]+)\s*(?:\[(\d+)\])?$")


def _variable(text: str) -> Variable | None:
    match = _VARIABLE.match(text)
    if not match:
        return None
    space, align, width, name, bracket, count = match.groups()
    unit = _TYPE_BYTES[width]
    size = unit * int(count) if count else (0 if bracket else unit)
    return Variable(name, space, int(align or unit), size)


def _params(text: str) -> tuple[list[Param], int]:
    params, offset = [], 0
    for item in _split_top(text):
        match = _PARAM.match(re.sub(r"\s+", " ", item).strip())
        if not match:
            raise UnsupportedInstruction(f"parameter declaration not understood: {item}")
        align, _, width, name, count = match.groups()
        unit = _TYPE_BYTES[width]
        step = int(align or unit)
        offset = -(-offset // step) * step
        params.append(Param(name, offset, unit * int(count or 1)))
        offset += params[-1].size
    return params, offset


class _Body:
    """Reads the text between a kernel's braces; inner braces are scopes with their own registers and labels."""

    def __init__(self, kernel: Kernel, text: str, first_line: int, files: dict[int, str], shared: dict[str, Variable]):
        self.kernel, self.text, self.files = kernel, text, files
        self.line = first_line
        self.scopes: list[dict[str, str]] = [{}]
        self.scope = 0
        self.parents = [-1]
        self.statements: list[tuple[str, int, int, str | None]] = []
        self.source: str | None = None
        self.symbols = dict(shared)

    def read(self) -> None:
        pos, text = 0, self.text
        token = re.compile(r"\s*(?:([{}])|([$\w]+)\s*:(?!:)|(\.(?:loc|file|pragma)\b[^\n]*)|([^;]+);)")
        while pos < len(text):
            match = token.match(text, pos)
            if not match:
                if text[pos:].strip():
                    raise UnsupportedInstruction(
                        f"PTX line {self.line}: not understood: {text[pos : pos + 80].strip()}"
                    )
                break
            start = match.start(match.lastindex)
            self.line += text.count("\n", pos, start)
            brace, label, directive, statement = match.groups()
            if brace:
                self._brace(brace)
            elif label:
                self._declare(label)
                self.kernel.labels[self.scopes[self.scope][label]] = len(self.statements)
            elif directive:
                self._directive(directive)
            elif statement.startswith("."):
                self._declaration(statement)
            else:
                self.statements.append((" ".join(statement.split()), self.line, self.scope, self.source))
            self.line += text.count("\n", start, match.end())
            pos = match.end()
        for statement in self.statements:
            self.kernel.instructions.append(self._instruction(*statement))
        for i, instruction in enumerate(self.kernel.instructions):
            instruction.index = i

    def _brace(self, brace: str) -> None:
        if brace == "{":
            self.scopes.append({})
            self.parents.append(self.scope)
            self.scope = len(self.scopes) - 1
        else:
            self.scope = self.parents[self.scope]

    def _declare(self, name: str) -> str:
        unique = name if self.scope == 0 else f"{name}@{self.scope}"
        self.scopes[self.scope][name] = unique
        return unique

    def _directive(self, text: str) -> None:
        match = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
        if match:
            number = int(match.group(1))
            self.source = f"{self.files.get(number, f'file {number}')}:{match.group(2)}"

    def _declaration(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, flags=re.S)
        if match:
            for name in _split_top(match.group(2)):
                span = re.fullmatch(r"(%?[$\w]+)<(\d+)>", name)
                names = [f"{span.group(1)}{i}" for i in range(int(span.group(2)))] if span else [name]
                for each in names:
                    self.kernel.registers[self._declare(each)] = match.group(1)
            return
        variable = _variable(" ".join(text.split()))
        if variable is None:
            raise UnsupportedInstruction(f"PTX line {self.line}: declaration not understood: {text}")
        variable.name = self._declare(variable.name)
        self.kernel.variables.append(variable)

    def _resolve(self, name: str, scope: int) -> str:
        while scope >= 0:
            if name in self.scopes[scope]:
                return self.scopes[scope][name]
            scope = self.parents[scope]
        return name

    def _operand(self, text: str, scope: int) -> object:
        if text.startswith("{"):
            return Vec(tuple(self._operand(t, scope) for t in _split_top(text[1:-1])))
        if text.startswith("["):
            inner = _split_top(text[1:-1])
            base, offset = inner[0], 0
            match = re.fullmatch(r"([%$\w@.]+)\s*\+\s*(-?\w+)", base)
            if match:
                base, offset = match.group(1), _int(match.group(2))
            coords = self._operand(inner[1], scope).items if len(inner) > 1 else None
            return Mem(self._operand(base, scope), offset, coords)
        if text.startswith("!"):
            return Reg(self._resolve(text[1:], scope), negated=True)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip(), scope), self._operand(second.strip(), scope))
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Imm("f32", int(text[2:], 16))
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Imm("f64", int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Imm("int", _int(text))
        name = self._resolve(text, scope)
        if name in self.kernel.registers:
            return Reg(name)
        if text.startswith("%"):
            return Special(text)
        match = re.fullmatch(r"([$\w]+)\s*\+\s*(\d+)", text)
        return Sym(self._resolve(match.group(1), scope), int(match.group(2))) if match else Sym(name)

    def _instruction(self, text: str, line: int, scope: int, source: str | None) -> Instruction:
        body, guard = text, None
        if body.startswith("@"):
            head, body = body.split(None, 1)
            guard = Reg(self._resolve(head[1:].lstrip("!"), scope), negated=head.startswith("@!"))
        op, _, rest = body.partition(" ")
        args = tuple(self._operand(a, scope) for a in _split_top(rest))
        return Instruction(op, tuple(op.split(".")), args, guard, line, text, source)


def _matching_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return start + match.start()
    raise UnsupportedInstruction("unbalanced braces in PTX")


@lru_cache(maxsize=64)
def parse(ptx: str) -> dict[str, Kernel]:
    """Parse PTX text into its kernels by name.

    Raises UnsupportedInstruction on declarations that it does not know; instructions are looked up when they are bound.
    """
    text = _strip_comments(ptx)
    files = {int(n): name for n, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, flags=re.M)}
    entry = re.compile(r"\.entry\s+([$\w]+)\s*\(([^)]*)\)([^{]*)\{")
    first = entry.search(text)
    head = text[: first.start()] if first else text
    shared = {}
    for statement in head.split(";"):
        match = re.search(r"(?:\.extern\s+)?\.(?:shared|global)\s.*", " ".join(statement.split()))
        variable = _variable(match.group()) if match else None
        if variable is not None:
            shared[variable.name] = variable
    kernels = {}
    for match in entry.finditer(text):
        params, size = _params(match.group(2))
        kernel = Kernel(match.group(1), params, size, variables=list(shared.values()))
        reqntid = re.search(r"\.reqntid\s+([\d,\s]+)", match.group(3))
        if reqntid:
            kernel.reqntid = tuple(int(x) for x in reqntid.group(1).split(",") if x.strip())
        end = _matching_brace(text, match.end() - 1)
        _Body(kernel, text[match.end() : end], text.count("\n", 0, match.end()) + 1, files, shared).read()
        kernels[kernel.name] = kernel
    return kernels
