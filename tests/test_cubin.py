"""The ELF reader against a file made by hand, and against cuobjdump where there is one."""

import os
import re
import shutil
import struct
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from flash_attn_sm120 import cubin
from flash_attn_sm120.occupancy import occupancy


def handmade(kernels):
    """A cubin with just the sections that matter. kernels: {name: (registers, frame, minimum stack, shared)}."""
    names = list(kernels)
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    symbols = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0)
    symbols += b"".join(struct.pack("<IBBHQQ", strings.index(n.encode() + b"\0"), 0x12, 0, 0, 0, 0) for n in names)
    info = struct.pack("<BBH", 3, 0x1B, 0xFF)
    for index, name in enumerate(names, 1):
        for attribute, value in zip((0x2F, 0x11, 0x12), kernels[name], strict=False):
            info += struct.pack("<BBHII", 4, attribute, 8, index, value)
    sections = [
        ("", 0, b"", 0),
        (".strtab", 3, strings, 0),
        (".symtab", 2, symbols, 1),
        (".nv.info", 0x70000000, info, 2),
    ]
    for name, values in kernels.items():
        sections.append((f".text.{name}", 1, b"\0" * 16, 0))
        if values[3]:
            sections.append((f".nv.shared.{name}", 8, b"\0" * values[3], 0))
    section_names = b"".join(name.encode() + b"\0" for name, *_ in sections) + b".shstrtab\0"
    sections.append((".shstrtab", 3, section_names, 0))
    body, headers = b"", b""
    for name, kind, data, link in sections:
        place = section_names.index(name.encode() + b"\0")
        headers += struct.pack("<IIQQQQIIQQ", place, kind, 0, 0, 64 + len(body), len(data), link, 0, 1, 0)
        body += data
    ident = b"\x7fELF\x02\x01\x01" + b"\0" * 9
    numbers = (2, 190, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(sections), len(sections) - 1)
    return ident + struct.pack("<HHIQQQIHHHHHH", *numbers) + body + headers


def test_handmade_file():
    kernels = {"plain": (255, 0, 0, 1024), "spills": (128, 176, 64, 0)}
    assert cubin.read(handmade(kernels)) == [
        cubin.KernelResources("plain", 255, 0, 1024),
        cubin.KernelResources("spills", 128, 176, 0),
    ]


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"not an ELF file" * 9, handmade({})[:18] + b"\x3e" * 100])
def test_other_bytes(data):
    with pytest.raises(ValueError, match=r"^cubin: expected a 64-bit CUDA ELF file, got"):
        cubin.read(data)


def test_cut_file():
    with pytest.raises(ValueError, match="cut short"):
        cubin.read(handmade({"kernel": (64, 0, 0, 0)})[:-70])


def cuobjdump():
    """On the PATH, or the one that triton brings along."""
    triton = find_spec("triton")
    brought = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    if brought and os.access(brought, os.X_OK):
        return str(brought)
    return shutil.which("cuobjdump")


@pytest.mark.parametrize("arch", ["sm_120a", "sm_121a"])
@pytest.mark.parametrize("options", [{}, {"mask": "local", "softcap": True, "packed_q": True, "packed_k": True}])
def test_compiled_kernel(arch, options, tmp_path):
    pytest.importorskip("cutlass")
    from flash_attn_sm120.compile import build
    from flash_attn_sm120.dispatch import choose
    from flash_attn_sm120.problem import AttentionProblem

    problem = AttentionProblem("bfloat16", 64, 64, **options)
    data = build(problem, choose(problem), arch, keep=True).__cubin__
    (kernel,) = cubin.read(data)
    assert 16 <= kernel.registers <= 255
    assert kernel.shared_bytes <= 1024
    tool = cuobjdump()
    if tool is None:
        pytest.skip("read, but there is no cuobjdump to compare with")
    file = tmp_path / "kernel.cubin"
    file.write_bytes(data)
    command = [tool, "--dump-resource-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (numbers,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    assert (kernel.registers, kernel.stack_bytes, kernel.shared_bytes) == tuple(map(int, numbers))


@pytest.mark.parametrize(
    "registers, num_warps, shared_bytes, blocks, limit",
    [
        (255, 8, 98 << 10, 1, "registers"),
        (255, 4, 49 << 10, 2, "registers"),
        (255, 4, 50 << 10, 1, "shared memory"),
        (128, 4, 24 << 10, 4, "registers"),
        (168, 4, 16 << 10, 3, "registers"),
        (32, 4, 1 << 10, 12, "warps"),
        (24, 1, 0, 24, "blocks"),
        (64, 4, 100 << 10, 0, "shared memory"),
        (255, 12, 1 << 10, 0, "registers"),
    ],
)
def test_occupancy(registers, num_warps, shared_bytes, blocks, limit):
    found = occupancy(registers, num_warps, shared_bytes)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.warps_a_sub_partition == blocks * num_warps / 4


def test_producer_warps_multiply_nothing():
    assert occupancy(168, 12, 96 << 10, matrix_warps=8).warps_a_sub_partition == 2
