"""The launcher for a problem on a target: from memory, a file that came with the package, the cache, or the compiler.

FLASH_ATTN_SM120_NO_JIT=1: what no file has is an error, and never compiled.
FLASH_ATTN_SM120_PRECOMPILED: a folder that `flash-attn-sm120 compile --out` made, to be used instead of the package's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from flash_attn_sm120 import cache, kernel_file, runtime
from flash_attn_sm120.kernel_file import Key, Problem
from flash_attn_sm120.labels import label

NO_JIT = "FLASH_ATTN_SM120_NO_JIT"
PRECOMPILED = "FLASH_ATTN_SM120_PRECOMPILED"
COMPILE_MB = 768  # a process with the compiler takes at most two thirds of it, see benchmarks/results/startup.md

# What making a file of a kernel can raise: an object that the linker doesn't know, or another release of the DSL.
NOT_KEPT = (AttributeError, ImportError, RuntimeError, TypeError, ValueError)

log = logging.getLogger("flash_attn_sm120")

_loaded: dict[tuple[Problem, str], Callable] = {}
_locks: dict[tuple[Problem, str], threading.Lock] = {}
_compiling = threading.Lock()


def load(problem: Problem, arch: str) -> Callable:
    """The launcher for a problem on a target such as "sm_120a"; each is looked for, and compiled, once a process.

    Call it as fn(*arguments.Arguments(...)), and Partials or None for a decode problem, or DualGroupArguments,
    CombineArguments or ClassifyArguments for their problems; plain tuples serve as groups. It launches on PyTorch's
    current stream.
    Raises RuntimeError where FLASH_ATTN_SM120_NO_JIT is set and no file has it.
    """
    known = (problem, arch)
    launcher = _loaded.get(known)
    if launcher is None:
        with _locks.setdefault(known, threading.Lock()):
            launcher = _loaded.get(known)
            if launcher is None:
                launcher = _loaded[known] = _from_file(problem, arch) or _compiled(problem, arch)
    return launcher


def is_loaded(problem: Problem, arch: str) -> bool:
    """Whether this process has it."""
    return (problem, arch) in _loaded


def source_of(problem: Problem, arch: str) -> str:
    """Where load would find it: "precompiled", "cached" or "JIT"."""
    if _precompiled(problem, arch):
        return "precompiled"
    key, kept = _cached_key(problem, arch), cache.open_cache()[0]
    return "cached" if key is not None and kept is not None and kept.read(key) else "JIT"


def precompiled_folder() -> Path:
    """Where the files that came with the package are."""
    named = os.environ.get(PRECOMPILED)
    return Path(named) if named else Path(__file__).parent / "precompiled"


def jit_allowed() -> bool:
    """Raises ValueError where the environment says neither yes nor no."""
    text = os.environ.get(NO_JIT, "0")
    if text not in ("", "0", "1"):
        raise ValueError(f"{NO_JIT}: expected 0 or 1, got {text!r}")
    return text != "1"


def _from_file(problem: Problem, arch: str) -> Callable | None:
    path = _precompiled(problem, arch)
    launcher = _opened(path) if path else None
    if launcher is None:
        key, kept = _cached_key(problem, arch), cache.open_cache()[0]
        path = kept.read(key) if key is not None and kept is not None else None
        launcher = _opened(path) if path else None
    return launcher


def _precompiled(problem: Problem, arch: str) -> Path | None:
    processor = kernel_file.host()
    key = kernel_file.built_in_key(problem, arch, processor) if processor else None
    if key is None:
        return None
    path = precompiled_folder() / kernel_file.file_name(key)
    try:
        content = path.read_bytes()
        kernel_file.check(content, key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as reason:
        log.warning("passed over a file of the package: %s, %s", path, reason)
        return None
    return path if _driver_takes(kernel_file.read_note(content)[1]) else None


def _driver_takes(made_by: str) -> bool:
    """A driver loads what the CUDA compilers of its own major release and of older ones make."""
    newest = runtime.driver_major()
    return newest is None or not made_by or int(made_by.partition(".")[0]) <= newest


def _cached_key(problem: Problem, arch: str) -> Key | None:
    processor = kernel_file.host()
    return kernel_file.cached_key(problem, arch, processor) if processor else None


def _opened(path: Path) -> Callable | None:
    try:
        return runtime.open_launcher(path)
    except OSError as reason:
        log.warning("can't be loaded: %s, %s", path, reason)
        return None


def _compiled(problem: Problem, arch: str) -> Callable:
    if not jit_allowed():
        raise RuntimeError(
            f"{NO_JIT} is set, and neither {precompiled_folder()} nor the cache has a kernel for "
            f"{label(problem)} on {arch}: {problem}"
        )
    key = _cached_key(problem, arch)
    kept = cache.open_cache()[0] if key is not None else None
    if kept is None or key is None:
        return _build(problem, arch)
    with kept.lock(key):
        path = kept.read(key)  # of the process that was waited for
        return (_opened(path) if path else None) or _build(problem, arch, kept, key)


def _build(problem: Problem, arch: str, kept: cache.Cache | None = None, key: Key | None = None) -> Callable:
    """Compiles, keeps the file where there is a cache, and hands out what the file has, as any other process will."""
    with _compiling, _place_in_memory():
        from flash_attn_sm120 import compile

        built, _ = compile.build_best(problem, arch)
        if kept is None or key is None:
            return built
        try:
            content = compile.to_file(built, key)
        except NOT_KEPT as reason:
            log.warning("%s can't be kept in a file: %s", key["variant"], reason)
            return built
    path = kept.write(key, content)
    return (_opened(path) if path else None) or built


@contextlib.contextmanager
def _place_in_memory() -> Iterator[None]:
    """One of as many places as compilers fit into memory, over all of the user's processes that have a cache."""
    kept, _ = cache.open_cache()
    if kept is None:
        yield
        return
    import fcntl

    with contextlib.ExitStack() as stack:
        places = compilers_that_fit()
        for place in range(places):
            try:
                file = stack.enter_context(open(kept.folder / f"compiler-{place}.lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if place + 1 == places:
                    log.warning("waiting for memory: %d compilers are running", places)
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                break
        yield


def compilers_that_fit() -> int:
    """Compilers that may run at a time: one for each COMPILE_MB of memory that is free, at most one a processor."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free_kb = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        return max(1, min(len(os.sched_getaffinity(0)), free_kb // (COMPILE_MB << 10)))
    return 1
