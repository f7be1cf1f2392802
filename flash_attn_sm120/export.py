"""A compiled launcher as a relocatable object, for the processor of this machine or the other one.

CuTe DSL keeps the host code of a compiled function as an LLVM module, with the cubin inside. Its own export writes one
for this machine only where TVM FFI is on; the function below it takes any processor, and is used for both, so that a
file doesn't depend on where it was made.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cutlass.base_dsl.export import get_export_module
from cutlass.base_dsl.version_info import CUDA_VERSION
from cutlass.cutlass_dsl import tvm_ffi_provider

from flash_attn_sm120.runtime import SYMBOL

ENTRY = SYMBOL.removeprefix("__tvm_ffi_")
TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}


def cuda_release() -> str:
    """Of the compiler's CUDA, such as "12.9"."""
    return f"{CUDA_VERSION.major}.{CUDA_VERSION.minor}"


def to_object(built: Any, host: str) -> bytes:
    """The ELF object of what compile.build returns, whose function SYMBOL takes TVM FFI's calls.

    host: a key of TRIPLES. Raises RuntimeError where the compiler can't."""
    function = built.function_name
    module = get_export_module(built.ir_module, f"__cute_internal_{ENTRY}", preserve_symbols={f"__tvm_ffi_{function}"})
    tvm_ffi_provider.rename_tvm_ffi_function(module, function, ENTRY)
    tvm_ffi_provider._inplace_hide_symbols(module, lambda name: not name.startswith("__tvm_ffi"))
    engine = built.export_provider.mlirExecutionEngine
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "launcher.o")
        engine.dump_object_file_pic(module, str(path), SYMBOL, host_triple=TRIPLES[host])
        return path.read_bytes()
