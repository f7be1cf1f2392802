"""Mods by what they compute: score_mod and mask_mod functions as part of a compile key.

A function is known by its code and by all that the code refers to, so that one which is defined again, in a loop, a
notebook or a reloaded module, finds its compiled kernel, and one that differs in a constant never does.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import importlib.util
import itertools
import re
import sys
import sysconfig
import types
import weakref
from collections.abc import Mapping
from operator import is_
from pathlib import Path
from typing import Any

from flash_attn_sm120.checks import describe, refuse
from flash_attn_sm120.problem import Mod

MISSING = object()
_MEMO = "_flash_attn_sm120_mod"
_PLAIN = (bool, int, float, complex, str, bytes, range)
_MUTABLE = (list, dict, set, bytearray)
_BY_NAME = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
)
_LRU_CACHE = type(functools.lru_cache(len))
# Of a code object's flags: *args, **kwargs, generator, coroutine, asynchronous generator.
_CODE_FLAGS = 0x04 | 0x08 | 0x20 | 0x80 | 0x200
_HEAP_TYPE = 1 << 9
# What a class holds besides its members.
_CLASS_NOTES = frozenset({
    "__dict__", "__weakref__", "__doc__", "__module__",
    "__qualname__", "__firstlineno__", "__static_attributes__", "__annotations__",
    "__annotate__", "__annotations_cache__", "__annotate_func__", "__dataclass_fields__",
    "__dataclass_params__", "__match_args__", "__abstractmethods__", "_abc_impl",
    "__orig_bases__", "__parameters__",
})  # fmt: skip
_KNOWN = "numbers, strings, functions, or tuples, lists, dicts and sets of these"


def mod_of(name: str, function: Any) -> Mod | None:
    """The Mod of a user's function, or None for None; a few microseconds where nothing changed since the last call.

    name: the argument, "score_mod" or "mask_mod", for messages.
    function: a function (under cute.jit or plain), functools.partial, bound method, or object with __call__. Its
        attribute __vec_size__ is the Mod's width, 1 without.

    The digest is of bytecode, constants, names, defaults, closure cells and the globals that it names: functions and
    classes by their own code in turn, modules and what libraries define by name, attributes of the user's own modules
    followed. Line numbers, file and the function's name don't count.
    Raises TypeError where function isn't callable, or where it refers to what can't be compared, such as a tensor.
    """
    if function is None:
        return None
    memo = _recall(function)
    if memo is not None and memo.holds() and memo.width == _width(name, function):
        return Mod(memo.digest, memo.width, function)
    if not callable(function) or isinstance(function, type):
        refuse(name, "a function or None", describe(function), TypeError)
    width = _width(name, function)
    reader = _Reader(name)
    if isinstance(function, types.FunctionType):
        token = reader.function(function, by_name=False)
    else:
        token = reader.value(function, name)
    if Mod("", width, function).bias is not None:
        token = (token, "bias")
    memo = _Memo(hashlib.sha256(repr((width, token)).encode()).hexdigest(), width, reader)
    _remember(function, memo)
    return Mod(memo.digest, width, function)


def _width(name: str, function: Any) -> int:
    """Elements of the vectors that it takes; a partial takes those of its function."""
    width = getattr(function, "__vec_size__", None)
    while width is None and isinstance(function, functools.partial):
        function = function.func
        width = getattr(function, "__vec_size__", None)
    width = 1 if width is None else width
    if type(width) is not int or width < 1:
        refuse(name, "an int >= 1 as __vec_size__", describe(width), TypeError)
    return width


class _Memo:
    """A digest, and the identity of everything it was made from."""

    __slots__ = ("cells", "codes", "contents", "digest", "entries", "width")

    def __init__(self, digest: str, width: int, reader: _Reader) -> None:
        self.digest, self.width = digest, width
        self.entries, self.cells, self.codes = tuple(reader.entries), tuple(reader.cells), tuple(reader.codes)
        self.contents = tuple(reader.contents)

    def holds(self) -> bool:
        """Nothing was bound anew or changed since."""
        for mapping, key, value in self.entries:
            if mapping.get(key, MISSING) is not value:
                return False
        for cell, value in self.cells:
            if _in_cell(cell) is not value:
                return False
        for function, code, defaults, kwdefaults in self.codes:
            if _code_of(function) is not code or function.__defaults__ is not defaults:
                return False
            if function.__kwdefaults__ is not kwdefaults:
                return False
        for container, items in self.contents:
            now = _items(container)
            if len(now) != len(items) or not all(map(is_, now, items)):
                return False
        return True


# Of callables that aren't functions: id -> (weak reference, memo). A function keeps its memo in its own __dict__.
_memos: dict[Any, tuple[weakref.ref, _Memo]] = {}


def _recall(function: Any) -> _Memo | None:
    if function.__class__ is types.FunctionType:
        owner, memo = function.__dict__.get(_MEMO, (None, None))
        return memo if owner is function else None  # functools.wraps copies a __dict__
    key, owner = _place(function)
    reference, memo = _memos.get(key, (None, None))
    return memo if reference is not None and reference() is owner else None


def _remember(function: Any, memo: _Memo) -> None:
    if isinstance(function, types.FunctionType):
        function.__dict__[_MEMO] = (function, memo)
        return
    key, owner = _place(function)
    try:
        _memos[key] = (weakref.ref(owner, lambda gone: _forget(key, gone)), memo)
    except TypeError:
        return


def _forget(key: Any, gone: weakref.ref) -> None:
    if _memos is not None and _memos.get(key, (None,))[0] is gone:  # None while the interpreter ends
        del _memos[key]


def _place(function: Any) -> tuple[Any, Any]:
    """(key, object that lives as long as the key means it): a bound method is a new object at each access."""
    if isinstance(function, types.MethodType):
        return (id(function.__self__), id(function.__func__)), function.__self__
    return id(function), function


class _Reader:
    """Turns what a function is made of into a token, nested tuples of strings and numbers, and notes where it looked.

    entries: (mapping, key, value); cells: (cell, content); codes: (function, code, defaults, kwdefaults);
    contents: (mutable container, its items at the time).
    """

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.entries: list[tuple[Mapping, str, Any]] = []
        self.cells: list[tuple[types.CellType, Any]] = []
        self.codes: list[tuple[types.FunctionType, types.CodeType, Any, Any]] = []
        self.contents: list[tuple[Any, tuple]] = []
        self.seen: dict[int, int] = {}
        self.open: set[int] = set()

    def entry(self, mapping: Mapping, key: str) -> Any:
        value = mapping.get(key, MISSING)
        self.entries.append((mapping, key, value))
        return value

    def content(self, container: Any) -> tuple:
        items = _items(container)
        self.contents.append((container, items))
        return items

    def refuse(self, value: Any, where: str) -> None:
        refuse(
            self.argument,
            f"{_KNOWN} as {where} (pass the rest through aux_tensors or aux_scalars)",
            describe(value),
            TypeError,
        )

    def value(self, value: Any, where: str) -> tuple:
        """The token of anything that code can refer to; where: in words, for the message."""
        kind = type(value)
        if value is None or value is Ellipsis or value is NotImplemented or kind in _PLAIN:
            return kind.__name__, repr(value)
        if kind in (tuple, frozenset) or kind in _MUTABLE:
            return self.container(value, where)
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, _BY_NAME):
            return self.builtin(value, where)
        if isinstance(value, types.CodeType):
            return self.code(value, where)
        if isinstance(value, type):
            return self.type(value)
        if isinstance(value, types.ModuleType):
            if not _is_library(value.__name__):
                self.refuse(value, f"{where}, or the one attribute of the module that is used")
            return "module", value.__name__
        if isinstance(value, enum.Enum):
            return "enum", self.type(kind), value.name, self.value(value.value, f"{where}.value")
        return self.object(value, where)

    def object(self, value: Any, where: str) -> tuple:
        """The token of an instance."""
        kind = type(value)
        if isinstance(value, types.MethodType):
            of = f"the object that {where} is bound to"
            owner = value.__self__
            bound = self.type(owner) if isinstance(owner, type) else self.instance(owner, of)
            return "method", self.value(value.__func__, where), bound
        if isinstance(value, functools.partial):
            parts = (self.value(value.func, where), self.value(value.args, f"an argument of {where}"))
            return "partial", *parts, self.value(value.keywords, f"an argument of {where}")
        if isinstance(value, _LRU_CACHE):
            return self.value(value.__wrapped__, where)
        if isinstance(value, (staticmethod, classmethod)):
            return kind.__name__, self.value(value.__func__, where)
        if isinstance(value, property):
            return "property", *(self.value(part, where) for part in (value.fget, value.fset, value.fdel))
        if isinstance(value, tuple):
            return "named", self.type(kind), *(self.value(item, f"an item of {where}") for item in value)
        plain = _plain_number(value)
        if plain is not MISSING:
            return kind.__module__, kind.__name__, repr(plain)
        if not _is_library_type(kind) and (callable(value) or dataclasses.is_dataclass(value)):
            return self.instance(value, where)
        return self.refuse(value, where)

    def container(self, value: Any, where: str) -> tuple:
        kind, item = type(value), f"an item of {where}"
        if id(value) in self.open:
            self.refuse(value, f"{item}, not the container itself")
        items = self.content(value) if kind in _MUTABLE else tuple(value)
        self.open.add(id(value))
        tokens = [self.value(each, item) for each in items]
        self.open.remove(id(value))
        if kind in (set, frozenset):
            tokens.sort(key=repr)
        return kind.__name__, *tokens

    def instance(self, value: Any, where: str) -> tuple:
        """An object of a class that Python defines: its class and its fields."""
        kind = type(value)
        if _is_library_type(kind) or not all(base.__flags__ & _HEAP_TYPE for base in kind.__mro__[:-1]):
            self.refuse(value, where)
        if id(value) in self.seen:
            return "again", self.seen[id(value)]
        self.seen[id(value)] = len(self.seen)
        fields = []
        if hasattr(value, "__dict__"):
            items = self.content(value.__dict__)
            fields += zip(items[::2], items[1::2], strict=True)
        for slot in itertools.chain.from_iterable(_slots(base) for base in kind.__mro__):
            fields.append((slot, getattr(value, slot, MISSING)))
        # A slot can't be watched: such an object is read at each call.
        if len(fields) * 2 != len(_items(getattr(value, "__dict__", {}))):
            self.contents.append((value, (MISSING,)))
        tokens = [(field, self.value(held, f"{where}.{field}")) for field, held in fields if field != "__vec_size__"]
        return "instance", self.type(kind), *sorted(tokens, key=repr)

    def builtin(self, value: Any, where: str) -> tuple:
        owner = getattr(value, "__self__", None)
        if owner is None or isinstance(owner, (types.ModuleType, type)):
            return "builtin", _module_name(value), value.__qualname__
        return "builtin", value.__name__, self.value(owner, f"the object that {where} is bound to")

    def type(self, value: type) -> tuple:
        """A class: a library's by name, the user's by its members too."""
        if _is_library_type(value):
            return "class", value.__module__, value.__qualname__
        if id(value) in self.seen:
            return "again", self.seen[id(value)]
        self.seen[id(value)] = len(self.seen)
        if issubclass(value, enum.Enum):
            members = [(name, self.value(member.value, name)) for name, member in value.__members__.items()]
        else:
            members = self.members(value)
        return "class", value.__name__, *(self.type(base) for base in value.__bases__), *members

    def members(self, value: type) -> list[tuple]:
        self.content(vars(value))
        tokens = []
        for name, member in vars(value).items():
            if name in _CLASS_NOTES or _generated(value, name, member):
                continue
            known = isinstance(member, (types.FunctionType, staticmethod, classmethod, property, type))
            if not known and hasattr(type(member), "__get__") and not isinstance(member, _BY_NAME):
                tokens.append((name, type(member).__qualname__))
            else:
                tokens.append((name, self.value(member, f"{value.__name__}.{name}")))
        return sorted(tokens, key=repr)

    def function(self, value: types.FunctionType, by_name: bool = True) -> tuple:
        """by_name: one that a library's module holds is known by its name."""
        value, decorated = _undecorated(value)
        module = value.__globals__.get("__name__", "")
        if by_name and _is_library(module) and _undecorated(_find(module, value.__qualname__))[0] is value:
            return "function", module, value.__qualname__
        if id(value) in self.seen:
            return "again", self.seen[id(value)]
        self.seen[id(value)] = len(self.seen)
        name, code = value.__name__, _code_of(value)
        self.codes.append((value, code, value.__defaults__, value.__kwdefaults__))
        defaults = tuple(self.value(each, f"a default of {name}") for each in value.__defaults__ or ())
        kwdefaults = self.value(value.__kwdefaults__, f"a default of {name}")
        token = ("function", decorated, self.code(code, name), defaults, kwdefaults)
        if decorated:
            token += tuple((key, _annotation(each)) for key, each in value.__annotations__.items())
        return *token, *self.references(value, code)

    def code(self, code: types.CodeType, where: str) -> tuple:
        shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _CODE_FLAGS)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        constants = tuple(self.value(each, f"a constant of {where}") for each in code.co_consts)
        return code.co_code.hex(), getattr(code, "co_exceptiontable", b"").hex(), shape, names, constants

    def references(self, function: types.FunctionType, code: types.CodeType) -> list[tuple]:
        """Closure cells and globals that the code names, nested functions' included."""
        tokens, chains = [], _chains(code)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            held = _in_cell(cell)
            self.cells.append((cell, held))
            used = [c.names[1:] for c in chains if c.kind == "cell" and c.names[0] == name]
            for names in used or [()]:
                tokens.append((name, names, self.follow(held, names, f"closure variable {name!r}")))
        for chain in chains:
            name, *rest = chain.names
            if chain.kind == "global":
                held = self.entry(function.__globals__, name)
                if held is MISSING:
                    held = self.entry(function.__builtins__, name)
                tokens.append((chain.names, self.follow(held, rest, f"global {name!r}")))
            elif chain.kind == "import":
                package = function.__globals__.get("__package__") or ""
                held = _imported(name, package)
                tokens.append((chain.names, self.follow(held, rest, f"import {name}")))
        return tokens

    def follow(self, value: Any, names: Any, where: str) -> tuple:
        """The token of value.a.b.c, as far as the user's own modules reach, and attributes of functions."""
        if value is MISSING:
            return ("missing",)
        for name in names:
            if isinstance(value, types.FunctionType) and name in value.__dict__:
                held = self.entry(value.__dict__, name)
                return self.value(value, where), name, self.value(held, f"{where}.{name}")
            if not isinstance(value, types.ModuleType) or _is_library(value.__name__):
                break
            owner, where = value, f"{value.__name__}.{name}"
            value = self.entry(vars(owner), name)
            if value is MISSING:
                value = getattr(owner, name, MISSING)
                if value is MISSING:
                    return ("missing",)
        return self.value(value, where)


@dataclasses.dataclass(frozen=True)
class _Chain:
    """kind "global", "cell" or "import": a name and the attributes that are read off it at once."""

    kind: str
    names: tuple[str, ...]


def _chains(code: types.CodeType) -> list[_Chain]:
    """In order of appearance, each once."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", "CACHE", "PRECALL")]
    found: dict[_Chain, None] = {}
    for i, step in enumerate(steps):
        kind = None
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            kind = "global"
        elif step.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"):
            kind = "cell"
        elif step.opname == "IMPORT_NAME":
            name = "." * steps[i - 2].argval + step.argval
            taken = itertools.takewhile(lambda s: s.opname != "POP_TOP", steps[i + 1 :])
            names = [s.argval for s in taken if s.opname == "IMPORT_FROM"] if steps[i - 1].argval else []
            found.update(dict.fromkeys(_Chain("import", (name, attribute)) for attribute in names))
            if not names:
                found[_Chain("import", (name,))] = None
        if kind is not None:
            attributes = itertools.takewhile(lambda s: s.opname in ("LOAD_ATTR", "LOAD_METHOD"), steps[i + 1 :])
            found[_Chain(kind, (step.argval, *(s.argval for s in attributes)))] = None
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(dict.fromkeys(_chains(constant)))
    return list(found)


def _imported(name: str, package: str) -> types.ModuleType:
    return importlib.import_module(importlib.util.resolve_name(name, package) if name.startswith(".") else name)


def _in_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _items(container: Any) -> tuple:
    """What a container holds, a mapping's keys and values in turn."""
    if isinstance(container, (dict, types.MappingProxyType)):
        return tuple(itertools.chain.from_iterable(container.items()))
    return tuple(container) if isinstance(container, _MUTABLE) else ()


def _code_of(function: types.FunctionType) -> types.CodeType:
    """As the user wrote it: cute.jit puts its own in the place of __code__ at the first call."""
    return function.__dict__.get("_original_code", function.__code__)


def _undecorated(function: Any) -> tuple[Any, str]:
    """(the user's function, how the DSL's decorators on it treat it): off the wrappers that the DSL made."""
    decorated = ""
    while isinstance(function, types.FunctionType) and "__wrapped__" in function.__dict__:
        if function.__globals__.get("__name__", "").partition(".")[0] != "cutlass":
            break
        inside = function.__wrapped__
        kind = getattr(inside, "_decorator_kind", "op")
        decorated += f"{kind} {getattr(inside, '_preprocess_enabled', '')};"
        function = inside
    return function, decorated


def _find(module: str, qualname: str) -> Any:
    """What a loaded module holds under a name, or MISSING."""
    found: Any = sys.modules.get(module, MISSING)
    for name in qualname.split("."):
        found = getattr(found, name, MISSING)
    return found


def _module_name(value: Any) -> str:
    owner = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
    return str(getattr(value, "__module__", None) or getattr(owner, "__qualname__", None))


@functools.lru_cache(maxsize=4096)
def _under_library(path: str) -> bool:
    standard = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib")}
    installed = {"site-packages", "dist-packages"} & set(Path(path).parts)
    return bool(installed) or any(Path(path).is_relative_to(root) for root in standard if root)


def _is_library(name: Any) -> bool:
    """Whether a module is Python's or an installed package's, whose code stays as it is; this package counts as the
    user's, so that its mods are known by content."""
    top = name.partition(".")[0] if isinstance(name, str) else "__main__"
    if top in ("__main__", "flash_attn_sm120") or name not in sys.modules:
        return False
    if top == "cutlass" or name in sys.builtin_module_names:
        return True
    module = sys.modules[name]
    origin = getattr(module, "__file__", None) or getattr(module.__spec__, "origin", None)
    paths = [origin] if origin else list(getattr(module, "__path__", ()))
    return bool(paths) and all(path in ("built-in", "frozen") or _under_library(path) for path in paths)


def _is_library_type(kind: type) -> bool:
    """Of a library, by what its module holds: __module__ is a guess where a class was made by exec."""
    return _is_library(kind.__module__) and _find(kind.__module__, kind.__qualname__) is kind


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    private = "_" + kind.__name__.lstrip("_")
    hidden = ("__dict__", "__weakref__")
    return [private + s if s.startswith("__") and not s.endswith("__") else s for s in names if s not in hidden]


def _generated(kind: type, name: str, member: Any) -> bool:
    """A method that dataclasses wrote: it follows from the fields."""
    own_dataclass = "__dataclass_fields__" in vars(kind)
    code = getattr(member, "__code__", None)
    dunder = name.startswith("__") and name.endswith("__") and name != "__call__"
    return own_dataclass and dunder and code is not None and code.co_filename in ("<string>", dataclasses.__file__)


def _plain_number(value: Any) -> Any:
    """The Python number in a scalar of the DSL (Float32(1.5)) or of NumPy, or MISSING."""
    library = type(value).__module__.partition(".")[0]
    if library == "cutlass":
        held = getattr(value, "value", MISSING)
    elif library == "numpy" and getattr(value, "shape", None) == () and hasattr(type(value), "item"):
        held = value.item()
    else:
        return MISSING
    return held if type(held) in (bool, int, float) else MISSING


def _annotation(annotation: Any) -> str:
    """In words, without addresses."""
    if isinstance(annotation, str):
        return annotation
    if isinstance(annotation, type):
        return f"{annotation.__module__}.{annotation.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(annotation))
