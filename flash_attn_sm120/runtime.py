"""Launchers out of files: dlopen, and the two libraries that they call. The compiler isn't imported."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

SYMBOL = "__tvm_ffi_launch"
RUNTIME = "libcute_dsl_runtime.so"
NEEDED = (RUNTIME, "libtvm_ffi.so")

_libraries: list[ctypes.CDLL] = []
_lock = threading.Lock()


def open_launcher(path: Path) -> Callable:
    """The launcher in a shared object, which stays loaded. OSError where it can't be loaded or lacks the function."""
    import tvm_ffi

    _load_libraries()
    library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    try:
        address = ctypes.cast(getattr(library, SYMBOL), ctypes.c_void_p).value or 0
    except AttributeError as error:
        raise OSError(str(error)) from error
    return tvm_ffi.Function.__from_extern_c__(address, keep_alive_object=library)


def _load_libraries() -> None:
    """A library that is loaded is found by its name where a launcher's file asks for it."""
    with _lock:
        if not _libraries:
            found = list(_runtime_libraries())
            if not found:
                raise OSError(f"{RUNTIME} of nvidia-cutlass-dsl isn't installed")
            _libraries.append(ctypes.CDLL(str(found[0])))


@functools.cache
def compiler_libraries() -> str:
    """Of the installed compilers the one that the DSL takes here, "cu13" or "cu12"; "none" without one."""
    return next((path.parts[-3] for path in _runtime_libraries()), "none")


def dsl_folders() -> list[Path]:
    """Where nvidia-cutlass-dsl is installed, without importing it."""
    package = importlib.util.find_spec("nvidia_cutlass_dsl")
    return [] if package is None else list(map(Path, package.submodule_search_locations or ()))


def _runtime_libraries() -> Iterator[Path]:
    """The DSL's runtime library for the CUDA of this driver, as the DSL itself would choose it, the best first."""
    for name in filter(None, os.environ.get("CUTE_DSL_LIBS", "").split(os.pathsep)):
        if Path(name).name == RUNTIME:
            yield Path(name)
    major = driver_major()
    for cuda in ("cu13", "cu12"):
        for root in dsl_folders():
            path = Path(root, cuda, "lib", RUNTIME)
            if path.exists() and (major is None or int(cuda[2:]) <= major):
                yield path


@functools.cache
def driver_major() -> int | None:
    """The newest CUDA that the driver runs, or None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    return version.value // 1000 if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None
