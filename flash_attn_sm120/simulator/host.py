"""The real host code of a compiled function, run with stand-ins for the CUDA runtime.

CuTe DSL keeps the lowered host module beside the machine code. It is put into an execution engine of its own, in which
the names of the CUDA runtime that the module calls resolve to Python callbacks; a launch is written down (kernel, grid,
block, dynamic shared memory, parameter bytes) instead of executed. No compiler and no driver take part.
"""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass
from typing import Any

from .parser import Kernel, parse
from .report import UnsupportedInstruction

_P, _I = ctypes.c_void_p, ctypes.c_int
_KDL_CUDA = 2
# Device attributes that host code asks for: CUDA's number -> value on SM120.
_DEVICE_ATTRIBUTES = {
    1: 1024,
    8: 49152,
    10: 32,
    16: 188,
    39: 1536,
    75: 12,
    76: 0,
    81: 102400,
    97: 101376,
    82: 65536,
    12: 65536,
}


@dataclass
class Launch:
    """One kernel launch as the host code asked for it."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_smem: int
    params: bytes


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", _P), ("device_type", _I), ("device_id", _I), ("ndim", _I), ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", _P), ("strides", _P),
        ("byte_offset", ctypes.c_uint64), ("context", _P), ("deleter", _P),
    ]  # fmt: skip


def _dlpack_type(dtype: Any) -> tuple[int, int]:
    name = str(dtype).removeprefix("torch.")
    table = {"bfloat16": (4, 16), "bool": (6, 8), "float8_e4m3fn": (10, 8), "float8_e5m2": (12, 8)}
    if name in table:
        return table[name]
    for prefix, code in (("float", 2), ("uint", 1), ("int", 0)):
        if name.startswith(prefix):
            return code, int(name.removeprefix(prefix))
    raise TypeError(f"tensor of dtype {dtype}")


class _PretendCuda:
    """A CPU tensor that says through DLPack that it lies on CUDA device 0."""

    def __init__(self, tensor: Any):
        self.tensor = tensor
        self.shape = (ctypes.c_int64 * max(tensor.ndim, 1))(*tensor.shape)
        self.strides = (ctypes.c_int64 * max(tensor.ndim, 1))(*tensor.stride())
        code, bits = _dlpack_type(tensor.dtype)
        self.managed = _DLTensor(
            tensor.data_ptr(),
            _KDL_CUDA,
            0,
            tensor.ndim,
            code,
            bits,
            1,
            ctypes.addressof(self.shape),
            ctypes.addressof(self.strides),
            0,
        )

    def __dlpack__(self, **_: Any) -> object:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [_P, ctypes.c_char_p, _P]
        return new(ctypes.addressof(self.managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _KDL_CUDA, 0


class HostProgram:
    """The host side of one compiled function; call it with tensors and numbers to get its launches.

    artifact: from cute.compile with --enable-tvm-ffi and --keep-ptx; ptx: text to run instead of the artifact's.
    """

    def __init__(self, artifact: Any, ptx: str | None = None):
        import tvm_ffi
        from cutlass._mlir.execution_engine import ExecutionEngine
        from cutlass.base_dsl.env_manager import get_prefix_dsl_libs

        module = getattr(artifact, "ir_module", None)
        self.ptx = ptx or getattr(getattr(artifact, "artifacts", None), "PTX", None)
        if not self.ptx or module is None:
            raise ValueError(
                "artifact: expected what cute.compile returns with --enable-tvm-ffi --keep-ptx, got no PTX"
            )
        self.kernels: dict[str, Kernel] = parse(self.ptx)
        self.launches: list[Launch] = []
        self._lock = threading.Lock()
        self._handles: list[str] = []
        self._error: BaseException | None = None
        self._callbacks: list[Any] = []
        libraries = [p for p in (get_prefix_dsl_libs("CUTE_DSL") or "").split(os.pathsep) if p]
        self._engine = ExecutionEngine(module, opt_level=1, shared_libs=libraries)
        self._register()
        packed = ctypes.CFUNCTYPE(None, _P)(self._engine.raw_lookup("__tvm_ffi_" + artifact.function_name))

        # The engine hands out the entry with its arguments packed as an array of pointers, the result last.
        def forward(handle, arguments, count, result):
            values = (_P(handle), _P(arguments), ctypes.c_int32(count), _P(result), ctypes.c_int32(0))
            packed((_P * 5)(*(ctypes.addressof(v) for v in values)))
            return values[4].value

        entry = ctypes.CFUNCTYPE(_I, _P, _P, ctypes.c_int32, _P)(forward)
        self._callbacks += [packed, entry]
        self._function = tvm_ffi.Function.__from_extern_c__(ctypes.cast(entry, _P).value)

    def __call__(self, *args: Any) -> list[Launch]:
        """Run the host code; torch tensors go in as tensors of CUDA device 0 at their own addresses."""
        with self._lock:
            return self._run(args)

    def _run(self, args: tuple) -> list[Launch]:
        import tvm_ffi

        self.launches, self._error = [], None
        wrapped = []  # what the tensors of the call point to, alive until it returns

        def on_cuda(argument: Any) -> Any:
            if isinstance(argument, tuple):
                return tuple(map(on_cuda, argument))
            if not hasattr(argument, "data_ptr"):
                return argument
            wrapped.append(_PretendCuda(argument))
            return tvm_ffi.from_dlpack(wrapped[-1])

        try:
            self._function(*map(on_cuda, args))
        except Exception:
            if self._error is None:
                raise
        if self._error is not None:
            raise self._error
        return self.launches

    def _register(self) -> None:
        for name, (function, *types) in self.stand_ins().items():
            callback = ctypes.CFUNCTYPE(_I, *types)(self._kept(name, function))
            self._callbacks.append(callback)
            self._engine.raw_register_runtime(name, ctypes.cast(callback, _P))

    def stand_ins(self) -> dict[str, tuple]:
        """What host code calls of the CUDA runtime: name -> (function, types of its arguments)."""
        return {
            "_cudaLaunchKernelEx": (self._launch, _P, _P, _P),
            "_cudaLibraryLoadData": (lambda library, *_: _set(library, _P, 1), _P, _P, _P, _P, _I, _P, _P, _I),
            "_cudaLibraryGetKernel": (self._get_kernel, _P, _P, _P),
            "_cuKernelGetAttribute": (lambda value, *_: _set(value, _I, 0), _P, _I, _P, _I),
            "_cudaDeviceGetAttribute": (lambda value, name, _: _set(value, _I, _DEVICE_ATTRIBUTES[name]), _P, _I, _I),
            "_cudaGetDevice": (lambda value: _set(value, _I, 0), _P),
            "_cudaSetDevice": (lambda _: 0, _I),
            "_cudaKernelSetAttributeForDevice": (lambda *_: 0, _P, _I, _I, _I),
            "_cudaFuncSetAttribute": (lambda *_: 0, _P, _I, _I),
            "cuda_dialect_init_library_once": (self._init_library, _P, _P, _P, _P),
            "cuda_dialect_unload_library_once": (lambda *_: 0, _P),
        }

    def _kept(self, name: str, function):
        """An exception can't cross the host code: keep it, report a CUDA error (999, unknown) to the caller."""

        def call(*args):
            try:
                return function(*args)
            except BaseException as error:
                if isinstance(error, KeyError):
                    error = UnsupportedInstruction(f"{name}: {error}")
                self._error = self._error or error
                return 999

        return call

    def _init_library(self, state: int, init: int, load: int, _: int) -> int:
        """Load the library and its kernels the way the runtime does on a function's first call."""
        slot = ctypes.addressof(_P.from_address(state))
        code = ctypes.CFUNCTYPE(_I, _P)(init)(slot)
        return code or ctypes.CFUNCTYPE(_I, _P, _I)(load)(slot, 0)

    def _get_kernel(self, kernel: int, _: int, name: int) -> int:
        self._handles.append(ctypes.string_at(name).decode())
        return _set(kernel, _P, len(self._handles))

    def _launch(self, config: int, handle: int, parameters: int) -> int:
        words = (ctypes.c_uint32 * 8).from_address(config)
        kernel = self.kernels[self._handles[handle - 1]]
        block = bytearray(kernel.param_bytes)
        pointers = (_P * len(kernel.params)).from_address(parameters) if kernel.params else ()
        for parameter, pointer in zip(kernel.params, pointers, strict=True):
            block[parameter.offset : parameter.offset + parameter.size] = ctypes.string_at(pointer, parameter.size)
        smem = ctypes.c_uint64.from_address(config + 24).value
        self.launches.append(Launch(kernel.name, tuple(words[:3]), tuple(words[3:6]), smem, bytes(block)))
        return 0


def _set(address: int, kind: Any, value: int) -> int:
    kind.from_address(address).value = value
    return 0
