"""Mods are known by what they compute: the same digest for an equal definition, another for any that differs."""

import functools
import gc
import importlib
import math
import os
import subprocess
import sys
import textwrap
import weakref
from dataclasses import dataclass

import pytest
import torch

from flash_attn_sm120 import mod_key
from flash_attn_sm120.mod_key import mod_of

ARGS = "score, batch, head, q_idx, kv_idx, info, aux"


def define(source: str, name: str = "mod", lines: int = 0, **names):
    """What `source` calls `name`, defined in a file of its own, `lines` lines down."""
    names = {"__name__": "users_own", **names}
    text = "\n" * lines + textwrap.dedent(source).replace("ARGS", ARGS)
    exec(compile(text, f"file{lines}.py", "exec"), names)
    return names[name]


def digest(function) -> str:
    return mod_of("score_mod", function).digest


PLAIN = "def mod(ARGS):\n    return score * 2.0 + kv_idx"
# (source, the same with a difference that counts)
DIFFERENT = {
    "a constant": (PLAIN, PLAIN.replace("2.0", "3.0")),
    "the type of a constant": (PLAIN, PLAIN.replace("2.0", "2")),
    "the sign of zero": (PLAIN.replace("2.0", "0.0"), PLAIN.replace("2.0", "-0.0")),
    "an operation": (PLAIN, PLAIN.replace("*", "-")),
    "an argument": (PLAIN, PLAIN.replace("+ kv_idx", "+ q_idx")),
    "a method": ("def mod(ARGS):\n    return score.exp()", "def mod(ARGS):\n    return score.exp2()"),
    "a builtin": ("def mod(ARGS):\n    return max(score, 0)", "def mod(ARGS):\n    return min(score, 0)"),
    "a default": ("def mod(ARGS, cap=3.0):\n    return score * cap", "def mod(ARGS, cap=4.0):\n    return score * cap"),
    "a keyword default": (
        "def mod(ARGS, *, cap=3.0):\n    return score * cap",
        "def mod(ARGS, *, cap=4.0):\n    return score * cap",
    ),
    "a global number": ("CAP = 3\n" + PLAIN.replace("2.0", "CAP"), "CAP = 4\n" + PLAIN.replace("2.0", "CAP")),
    "a global list": (
        "CAPS = [1, 2]\ndef mod(ARGS):\n    return score * CAPS[0]",
        "CAPS = [1, 3]\ndef mod(ARGS):\n    return score * CAPS[0]",
    ),
    "a helper": (
        "def helper(x):\n    return x * 2\ndef mod(ARGS):\n    return helper(score)",
        "def helper(x):\n    return x * 3\ndef mod(ARGS):\n    return helper(score)",
    ),
    "a helper's global": (
        "C = 2\ndef helper(x):\n    return x * C\ndef mod(ARGS):\n    return helper(score)",
        "C = 3\ndef helper(x):\n    return x * C\ndef mod(ARGS):\n    return helper(score)",
    ),
    "a nested function": (
        "def mod(ARGS):\n    def inner(x):\n        return x * 2\n    return inner(score)",
        "def mod(ARGS):\n    def inner(x):\n        return x * 3\n    return inner(score)",
    ),
    "a nested function's global": (
        "C = 2\ndef mod(ARGS):\n    return (lambda x: x * C)(score)",
        "C = 3\ndef mod(ARGS):\n    return (lambda x: x * C)(score)",
    ),
    "a closure value": (
        "def make(cap):\n    def mod(ARGS):\n        return score * cap\n    return mod\nmod = make(2)",
        "def make(cap):\n    def mod(ARGS):\n        return score * cap\n    return mod\nmod = make(3)",
    ),
    "a closure's function": (
        "def make(f):\n    def mod(ARGS):\n        return f(score)\n    return mod\nmod = make(lambda x: x + 1)",
        "def make(f):\n    def mod(ARGS):\n        return f(score)\n    return mod\nmod = make(lambda x: x + 2)",
    ),
    "a partial's argument": (
        "from functools import partial\ndef full(cap, ARGS):\n    return score * cap\nmod = partial(full, 2)",
        "from functools import partial\ndef full(cap, ARGS):\n    return score * cap\nmod = partial(full, 3)",
    ),
    "a partial's keyword": (
        "from functools import partial\ndef full(ARGS, cap):\n    return score * cap\nmod = partial(full, cap=2)",
        "from functools import partial\ndef full(ARGS, cap):\n    return score * cap\nmod = partial(full, cap=3)",
    ),
    "an object's field": (
        "class M:\n    def __init__(self, c):\n        self.c = c\n    def __call__(self, ARGS):\n"
        "        return score * self.c\nmod = M(2)",
        "class M:\n    def __init__(self, c):\n        self.c = c\n    def __call__(self, ARGS):\n"
        "        return score * self.c\nmod = M(3)",
    ),
    "an object's code": (
        "class M:\n    def __call__(self, ARGS):\n        return score * 2\nmod = M()",
        "class M:\n    def __call__(self, ARGS):\n        return score * 3\nmod = M()",
    ),
    "a class attribute": (
        "class M:\n    c = 2\n    def __call__(self, ARGS):\n        return score * self.c\nmod = M()",
        "class M:\n    c = 3\n    def __call__(self, ARGS):\n        return score * self.c\nmod = M()",
    ),
    "a base class": (
        "class B:\n    c = 2\nclass M(B):\n    def __call__(self, ARGS):\n        return score * self.c\nmod = M()",
        "class B:\n    c = 3\nclass M(B):\n    def __call__(self, ARGS):\n        return score * self.c\nmod = M()",
    ),
    "a slot": (
        "class M:\n    __slots__ = ('c',)\n    def __call__(self, ARGS):\n        return score * self.c\n"
        "mod = M()\nmod.c = 2",
        "class M:\n    __slots__ = ('c',)\n    def __call__(self, ARGS):\n        return score * self.c\n"
        "mod = M()\nmod.c = 3",
    ),
    "a bound method's object": (
        "class M:\n    def run(self, ARGS):\n        return score * self.c\nm = M()\nm.c = 2\nmod = m.run",
        "class M:\n    def run(self, ARGS):\n        return score * self.c\nm = M()\nm.c = 3\nmod = m.run",
    ),
    "an enum's value": (
        "from enum import Enum\nclass E(Enum):\n    A = 2\ndef mod(ARGS):\n    return score * E.A.value",
        "from enum import Enum\nclass E(Enum):\n    A = 3\ndef mod(ARGS):\n    return score * E.A.value",
    ),
    "a named tuple's item": (
        "from collections import namedtuple\nN = namedtuple('N', 'c')(2)\ndef mod(ARGS):\n    return score * N.c",
        "from collections import namedtuple\nN = namedtuple('N', 'c')(3)\ndef mod(ARGS):\n    return score * N.c",
    ),
    "a dataclass's field": (
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass C:\n    c: int\nconf = C(2)\n"
        "def mod(ARGS):\n    return score * conf.c",
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass C:\n    c: int\nconf = C(3)\n"
        "def mod(ARGS):\n    return score * conf.c",
    ),
    "a helper's attribute": (
        "def helper(x):\n    return x\nhelper.c = 2\ndef mod(ARGS):\n    return score * helper.c",
        "def helper(x):\n    return x\nhelper.c = 3\ndef mod(ARGS):\n    return score * helper.c",
    ),
    "a decorator's code": (
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def g(*a):\n        return 2 * f(*a)\n"
        "    return g\n@twice\ndef mod(ARGS):\n    return score",
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def g(*a):\n        return 3 * f(*a)\n"
        "    return g\n@twice\ndef mod(ARGS):\n    return score",
    ),
    "a library's function": (
        "import math\ndef mod(ARGS):\n    return score * math.sin(1)",
        "import math\ndef mod(ARGS):\n    return score * math.cos(1)",
    ),
    "a name that a library's function is given": (
        "from math import sin as f\ndef mod(ARGS):\n    return score * f(1)",
        "from math import cos as f\ndef mod(ARGS):\n    return score * f(1)",
    ),
    "a DSL number": (
        "from cutlass import Float32\nC = Float32(2.0)\ndef mod(ARGS):\n    return score * C",
        "from cutlass import Float32\nC = Float32(3.0)\ndef mod(ARGS):\n    return score * C",
    ),
    "a DSL class": (
        "from cutlass import Float32 as T\ndef mod(ARGS):\n    return score * T(2)",
        "from cutlass import Float16 as T\ndef mod(ARGS):\n    return score * T(2)",
    ),
    "a NumPy number": (
        "import numpy\nC = numpy.float32(2)\ndef mod(ARGS):\n    return score * C",
        "import numpy\nC = numpy.float64(2)\ndef mod(ARGS):\n    return score * C",
    ),
    "which of two cycles": (
        "def even(n):\n    return n or odd(n)\ndef odd(n):\n    return even(n)\ndef mod(ARGS):\n    return even(score)",
        "def even(n):\n    return n or odd(n)\ndef odd(n):\n    return n or even(n)\n"
        "def mod(ARGS):\n    return even(score)",
    ),
    "the vector's width": (PLAIN, PLAIN + "\nmod.__vec_size__ = 2"),
}  # fmt: skip


@pytest.mark.parametrize("first, second", DIFFERENT.values(), ids=DIFFERENT)
def test_a_difference_that_counts(first, second):
    assert digest(define(first)) != digest(define(second))
    for source in (first, second):
        assert digest(define(source)) == digest(define(source, lines=40))


def test_names_and_places_do_not_count():
    renamed = define(PLAIN.replace("def mod", "def other"), "other", lines=7, __name__="another")
    assert mod_of("score_mod", define(PLAIN)) == mod_of("mask_mod", renamed)
    tail = "def make():\n    def NAME(ARGS):\n        return score * 2.0 + kv_idx\n    return NAME\nmod = make()"
    assert digest(define(tail.replace("NAME", "a"))) == digest(define(tail.replace("NAME", "b")))
    assert digest(define(PLAIN)) == digest(define(tail.replace("NAME", "a")))
    future = "from __future__ import annotations\n" + PLAIN
    assert digest(define(future)) == digest(define(PLAIN))


def test_mods_compare_by_digest_and_keep_the_function():
    function = define(PLAIN)
    mod = mod_of("score_mod", function)
    assert mod.function is function and mod.width == 1
    assert mod == mod_of("score_mod", define(PLAIN)) and len({mod, mod_of("score_mod", define(PLAIN))}) == 1
    function.__vec_size__ = 4
    assert mod_of("score_mod", function).width == 4 and mod_of("score_mod", function) != mod
    partial = functools.partial(function)
    assert mod_of("score_mod", partial).width == 4
    partial.__vec_size__ = 2
    assert mod_of("score_mod", partial).width == 2
    assert mod_of("score_mod", None) is None


@pytest.mark.parametrize("kind", [list, dict, set, frozenset, tuple])
def test_containers(kind):
    def of(*items):
        value = kind(items) if kind is not dict else dict.fromkeys(items, items)
        return digest(define("def mod(ARGS):\n    return score * VALUE", VALUE=value))

    assert of(1, 2) == of(1, 2) != of(1, 3)
    assert of(1) != of(1.0) and of(1) != of(True) and of("1") != of(b"1") and of(...) != of(None)
    assert of((1, (2.5, None))) != of((1, (2.5, ...)))
    if kind in (set, frozenset):
        assert of("a", "b", "c", "d") == of("d", "c", "b", "a")


def test_bound_anew():
    """The digest is taken again where something that the function refers to changed, however deep."""
    names = {"__name__": "users_own", "CAP": 3, "LIST": [1, [2]], "TABLE": {"a": {1}}}
    exec(
        "def deep(x):\n    return x * CAP\n"
        "def helper(x):\n    return deep(x)\n"
        f"def mod({ARGS}):\n    return helper(score) + LIST[0] + TABLE['a'] + later(score)\n",
        names,
    )
    mod, seen = names["mod"], set()

    def fresh():
        now = digest(mod)
        assert digest(mod) == now and now not in seen
        seen.add(now)

    fresh()
    names["CAP"] = 4
    fresh()
    names["LIST"][1].append(5)
    fresh()
    names["TABLE"]["a"].add(7)
    fresh()
    names["TABLE"]["b"] = 1
    fresh()
    names["later"] = abs
    fresh()
    names["abs"] = 5
    names["deep"] = lambda x: x
    fresh()
    names["helper"].__defaults__ = (1,)
    fresh()
    names["helper"].__kwdefaults__ = {"k": 1}
    fresh()
    names["helper"].__kwdefaults__["k"] = 2
    fresh()
    names["helper"].__code__ = (lambda x: x + 1).__code__
    fresh()
    names["deep"], names["CAP"] = names["helper"], 4.0
    mod.__vec_size__ = 2
    fresh()


def test_closure_bound_anew():
    def make():
        cap = 3

        def mod(score, *_):
            return score * cap

        def change(value):
            nonlocal cap
            cap = value

        return mod, change

    mod, change = make()
    first = digest(mod)
    change(4)
    assert digest(mod) != first
    change(3)
    assert digest(mod) == first


def test_builtin_shadowed():
    mod = define("def mod(ARGS):\n    return abs(score)")
    first = digest(mod)
    mod.__globals__["abs"] = math.sqrt
    assert digest(mod) != first


def test_object_changed():
    class Scale:
        factor = 2

        def __init__(self):
            self.caps = [1]

        def __call__(self, score, *_):
            return score * self.factor + self.caps[0]

        def method(self, score, *_):
            return score * self.factor

    for pick in (lambda scale: scale, lambda scale: scale.method):
        scale = Scale()
        seen = {digest(pick(scale))}
        assert digest(pick(Scale())) in seen
        scale.caps.append(2)
        seen.add(digest(pick(scale)))
        scale.factor = 3
        seen.add(digest(pick(scale)))
        assert len(seen) == 3
        scale.caps.pop()
        del scale.factor
        assert digest(pick(scale)) in seen
    before = digest(Scale())
    Scale.factor = 5
    assert digest(Scale()) != before
    partial = functools.partial(define("def mod(cap, ARGS):\n    return score * cap['c']"), {"c": 1})
    before = digest(partial)
    partial.args[0]["c"] = 2
    assert digest(partial) != before


def test_slot_changed():
    class Slotted:
        __slots__ = ("__weakref__", "cap")

        def __call__(self, score, *_):
            return score * self.cap

    mod = Slotted()
    mod.cap = 2
    first = digest(mod)
    assert digest(mod) == first
    mod.cap = 3
    assert digest(mod) != first


@pytest.mark.parametrize("name", ["an object's field", "an object's code", "a class attribute", "a helper"])
def test_names_of_other_modules(name):
    """Where code says that it is of a library, but isn't what that library holds, it is read."""
    first, second = (define(source, __name__="builtins") for source in DIFFERENT[name])
    assert digest(first) != digest(second)


def test_exceptions_that_are_caught():
    mod = define("def mod(x):\n    try:\n        return f(x)\n    except ValueError:\n        return x")
    first = digest(mod)
    if hasattr(mod.__code__, "co_exceptiontable"):
        mod.__code__ = mod.__code__.replace(co_exceptiontable=b"")
    else:
        mod.__code__ = define("def mod(x):\n    return f(x)").__code__
    assert digest(mod) != first


@dataclass
class Counted:
    """A callable object of this module; slots, fields and methods that dataclasses write."""

    cap: float = 1.0
    sides: tuple[int, ...] = (1, 2)

    def __call__(self, score, *_):
        return score * self.cap


def test_dataclass_callable():
    assert digest(Counted(2.0)) == digest(Counted(2.0)) != digest(Counted(3.0))


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """write(name, text): a module of the user's, loaded anew."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        name = name.rpartition("/")[2]
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            module = importlib.import_module(name)
        finally:
            sys.dont_write_bytecode = before
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return write


USES = [
    "def mod(ARGS):\n    return helpers.f(score)",
    "def mod(ARGS):\n    return (lambda x: helpers.f(x))(score)",
    "def make(m):\n    def mod(ARGS):\n        return m.f(score)\n    return mod\nmod = make(helpers)",
    "def mod(ARGS):\n    from helpers import f\n    return f(score)",
    "def mod(ARGS):\n    return package.helpers.f(score)",
]


@pytest.mark.parametrize("use", USES)
def test_attributes_of_own_modules(modules, use):
    def load(text):
        helpers = modules("helpers", text)
        package = modules("package", "import helpers")
        return digest(define(use, helpers=helpers, package=package)), helpers

    first, _ = load("def f(x):\n    return x * 2\nunused = object()\n")
    assert load("\n\ndef f(x):\n    return x * 2\nunused = 5\n")[0] == first
    assert load("def f(x):\n    return x * 3\n")[0] != first
    assert load("C = 2\ndef f(x):\n    return x * C\n")[0] != load("C = 4\ndef f(x):\n    return x * C\n")[0]


def test_libraries_are_known_by_name(modules, tmp_path, monkeypatch):
    """What an installed package's function refers to isn't looked at, unless that function is the mod itself."""
    (tmp_path / "site-packages").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    text = "C = object()\ndef f(x):\n    return x, C\ndef g(x):\n    return x + 1\n"
    installed = modules("site-packages/installed", text)
    uses = "def mod(ARGS):\n    return installed.f(score)", "def mod(ARGS):\n    return FUNCTION(score)"
    for use in uses:
        known = digest(define(use, installed=installed, FUNCTION=installed.f))
        other = use.replace(".f(", ".g(")
        assert known != digest(define(other, installed=installed, FUNCTION=installed.g))
    assert digest(installed.g) == digest(define("def g(x):\n    return x + 1", "g"))
    with pytest.raises(TypeError, match="global 'C'"):
        digest(installed.f)


def test_attribute_of_own_module_bound_anew(modules):
    helpers = modules("helpers", "CAP = 2")
    mod = define("def mod(ARGS):\n    return score * helpers.CAP", helpers=helpers)
    first = digest(mod)
    helpers.CAP = 3
    assert digest(mod) != first
    del helpers.CAP
    assert digest(mod) not in (first,)


def test_digest_in_another_process():
    """Neither addresses nor the order of sets go into it."""
    source = (
        "def helper(x):\n    return x in {'a', 'b', 'c', 'd'}\ndef mod(x, S={'k', 'l', 'm'}):\n    return helper(x)"
    )
    code = f"{source}\nfrom flash_attn_sm120.mod_key import mod_of\nprint(mod_of('score_mod', mod).digest)"
    found = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout.strip()
        for seed in "12"
    ]
    assert found == [digest(define(source))] * 2


class Opaque:
    pass


LOOP = [1]
LOOP.append(LOOP)


@pytest.mark.parametrize(
    "value, words",
    [
        (torch.ones(2), "float32 of shape (2,)"),
        ([1, (torch.ones(2),)], "an item of an item of"),
        ({"a": Opaque()}, "Opaque"),
        (Opaque(), "Opaque"),
        (LOOP, "not the container itself"),
        (functools.partial(abs, torch.ones(1)), "an argument of"),
        (sys.modules[__name__], "the one attribute of the module"),
        (iter(()), "iterator"),
    ],
)
def test_what_cannot_be_compared(value, words):
    def closure(score, *_):
        return score * value

    for function, where in (
        (closure, "closure variable 'value'"),
        (define("def mod(ARGS):\n    return score * VALUE", VALUE=value), "global 'VALUE'"),
        (define("def mod(ARGS, d=VALUE):\n    return score * d", VALUE=value), "a default of mod"),
    ):
        with pytest.raises(TypeError, match=r"^score_mod: expected .* aux_tensors or aux_scalars\), got ") as caught:
            mod_of("score_mod", function)
        assert where in str(caught.value) and words in str(caught.value)


def test_object_with_a_tensor():
    with pytest.raises(TypeError, match=r"mask_mod: .*\.cap.*aux_tensors"):
        mod_of("mask_mod", Counted(torch.ones(1)))


@pytest.mark.parametrize("value", [3, "causal", torch.ones(1), [], int])
def test_not_a_function(value):
    with pytest.raises(TypeError, match="mask_mod: expected a function or None, got"):
        mod_of("mask_mod", value)


@pytest.mark.parametrize("width", [0, -1, 2.0, True, "2"])
def test_wrong_width(width):
    mod = define(PLAIN)
    mod.__vec_size__ = width
    with pytest.raises(TypeError, match="score_mod: expected an int >= 1 as __vec_size__"):
        mod_of("score_mod", mod)


def test_a_second_call_reads_nothing(monkeypatch):
    """As long as nothing changed, what a function is made of isn't gone through again."""
    mod = define("def helper(x):\n    return x * 2\nC = [1, 2]\ndef mod(ARGS):\n    return helper(score) * C[0]")
    kept = [mod, functools.partial(mod), Counted(), Counted().__call__]
    digests = [digest(function) for function in kept]
    monkeypatch.setattr(mod_key, "_Reader", None)
    assert [digest(function) for function in kept] == digests
    mod.__globals__["C"].append(3)
    with pytest.raises(TypeError):
        digest(mod)


def test_a_copied_memo_does_not_hold():
    inner = define(PLAIN)
    digest(inner)

    @functools.wraps(inner)
    def outer(*args):
        return 2 * inner(*args)

    assert digest(outer) != digest(inner)


def test_functions_are_not_kept_alive():
    held = [define(PLAIN), functools.partial(define(PLAIN)), Counted(), define("def mod(ARGS):\n    return mod")]
    references = [weakref.ref(function) for function in held]
    for function in held:
        mod_of("score_mod", function)
    count = len(mod_key._memos)
    del held, function
    gc.collect()
    assert [reference() for reference in references] == [None] * 4
    assert len(mod_key._memos) == count - 2


JIT = """
from cutlass import cute
@cute.jit
def mod(ARGS):
    if q_idx < kv_idx:
        score = score * 2.0
    return score
"""


def test_under_cute_jit():
    """The user's code counts, not the wrapper's, and not what the DSL puts in its place."""
    pytest.importorskip("cutlass")
    first, second = define(JIT), define(JIT, lines=3)
    before = digest(second)
    assert digest(first) == before != digest(define(JIT.replace("2.0", "3.0")))
    inner = second.__wrapped__
    inner._original_code, inner.__code__ = inner.__code__, define(PLAIN).__code__
    assert digest(second) == before
    helper = JIT.replace("def mod", "def helper") + f"\ndef mod({ARGS}):\n    return helper(score)"
    assert digest(define(helper)) == digest(define(helper)) != digest(define(helper.replace("2.0", "3.0")))
    annotated = JIT.replace("ARGS", ARGS.replace("score,", "score: int,"))
    assert digest(define(annotated)) != before
    assert digest(define(JIT.replace("@cute.jit", "@cute.jit(preprocess=False)"))) != before
