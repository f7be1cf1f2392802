"""Runs hand-written PTX: arrays in, one array out, a thread an element."""

import numpy as np

from flash_attn_sm120.simulator import instructions  # noqa: F401
from flash_attn_sm120.simulator.global_memory import GlobalMemory, Region
from flash_attn_sm120.simulator.machine import Machine
from flash_attn_sm120.simulator.parser import parse

_REGISTER = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def run(ptx: str, arrays: dict[str, np.ndarray], grid=(1, 1, 1), block=(32, 1, 1), smem=0, batch_warps=64) -> None:
    """Run the only kernel of `ptx`; its parameters are the arrays' addresses, in order; arrays are 16-byte aligned."""
    kernel = next(iter(parse(ptx).values()))
    regions = [
        Region(name, a.ctypes.data, a.itemsize, a.shape, tuple(s // a.itemsize for s in a.strides))
        for name, a in arrays.items()
    ]
    params = b"".join(a.ctypes.data.to_bytes(8, "little") for a in arrays.values())
    Machine(kernel, grid, block, smem, params, GlobalMemory(regions), batch_warps).run()


def kernel_text(body: str, params: int, registers: str = "", head: str = "") -> str:
    declared = ", ".join(f".param .b64 p{i}" for i in range(params))
    return f"""
.version 9.0
.target sm_120a
.address_size 64
{head}
.visible .entry test({declared})
{{
    .reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %d<40>;
    {registers}
    {body}
    ret;
}}
"""


def aligned(count: int, dtype) -> np.ndarray:
    """Zeros that begin at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    raw = np.zeros(count * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * dtype.itemsize].view(dtype)


def elementwise(instruction: str, inputs: list[np.ndarray], out_dtype, setup: str = "") -> np.ndarray:
    """Run `instruction` for each element: %a, %b, %c are the inputs, %o the result; lengths are multiples of 32."""
    count, out_dtype = len(inputs[0]), np.dtype(out_dtype)
    arrays, loads, registers = {}, [], []
    for i, (name, values) in enumerate(zip("abc", inputs, strict=False)):
        arrays[name] = aligned(count, values.dtype)
        arrays[name][:] = values
        size = values.itemsize
        kind = _REGISTER[size]
        registers.append(f".reg .{kind} %{name};")
        loads.append(
            f"ld.param.b64 %d1, [p{i}]; mad.wide.u32 %d1, %r0, {size}, %d1; ld.global.b{8 * size} %{name}, [%d1];"
        )
    arrays["o"] = aligned(count, out_dtype)
    size = out_dtype.itemsize
    registers.append(f".reg .{_REGISTER[size]} %o;")
    body = f"""
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r0, %r2, 32, %r1;
    {" ".join(loads)}
    {setup}
    {instruction}
    ld.param.b64 %d1, [p{len(arrays) - 1}]; mad.wide.u32 %d1, %r0, {size}, %d1; st.global.b{8 * size} [%d1], %o;
    """
    run(kernel_text(body, len(arrays), " ".join(registers)), arrays, (count // 32, 1, 1))
    return arrays["o"]
