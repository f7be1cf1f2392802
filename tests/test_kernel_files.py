"""Compiled launchers in files: linked, loaded, and run, for this machine's processor and for AArch64."""

import ctypes
import functools
import struct
from dataclasses import replace

import pytest
import torch
from emulator import Argument, Emulated, dynamic
from oracle import assert_right, marks, rand

from flash_attn_sm120 import compile as compiler
from flash_attn_sm120 import export, kernel_file, reference, runtime, shared_object
from flash_attn_sm120.arguments import CombineArguments
from flash_attn_sm120.problem import AttentionProblem, CombineProblem
from flash_attn_sm120.simulator import attention, launch, simulate
from flash_attn_sm120.simulator.host import HostProgram, _dlpack_type, _DLTensor

COMBINE = CombineProblem("bfloat16", 64, lse=True)
ARCH = "sm_121a"
EM_CUDA = 190
on_x86_64 = pytest.mark.skipif(
    kernel_file.host() != "x86_64", reason="loads a file for x86-64; AArch64's are emulated below"
)


@functools.cache
def built(problem=COMBINE):
    return compiler.build_best(problem, ARCH, keep=True)[0]


@functools.cache
def file_of(host, problem=COMBINE):
    return compiler.to_file(built(problem), kernel_file.built_in_key(problem, ARCH, host))


def inputs():
    """Of a combine: parts, their lse, out, lse."""
    out, lse = torch.full((2, 5, 2, 64), 7.0).bfloat16(), torch.full((2, 2, 5), 7.0)
    return torch.randn(3, 2, 5, 2, 64), torch.randn(3, 2, 2, 5), out, lse


def cuda_elf_flags(content):
    """e_flags of the CUDA ELF file inside."""
    at = content.index(b"\x7fELF", 4)
    while struct.unpack_from("<H", content, at + 18)[0] != EM_CUDA:
        at = content.index(b"\x7fELF", at + 4)
    return struct.unpack_from("<I", content, at + 48)[0]


@pytest.mark.parametrize("host, machine", [("x86_64", 62), ("aarch64", 183)])
def test_a_file_is_a_shared_object_for_its_host_with_the_target_inside(host, machine):
    content = file_of(host)
    kind, number = struct.unpack_from("<HH", content, 16)
    assert content[:6] == b"\x7fELF\x02\x01" and kind == 3 and number == machine
    assert cuda_elf_flags(content) >> 8 & 0xFF == 121  # sm_121
    found = dynamic(content)
    assert found["libraries"] == list(runtime.NEEDED)
    assert [name for name, _, defined in found["symbols"] if defined] == [runtime.SYMBOL]
    key = kernel_file.read_key(content)
    assert (key["host"], key["target"], key["problem"]) == (host, ARCH, repr(COMBINE))


def test_the_same_kernel_makes_the_same_file():
    key = kernel_file.built_in_key(COMBINE, ARCH, "aarch64")
    assert compiler.to_file(built(), key) == file_of("aarch64")


def host_program(path, problem):
    """The shared object, loaded as users load it; its table of addresses then leads to the simulator's CUDA runtime."""
    content = file_of("x86_64", problem)
    path.write_bytes(content)
    launcher = runtime.open_launcher(path)
    program = HostProgram(built(problem))
    library, found = ctypes.CDLL(str(path)), dynamic(content)
    (entry,) = [value for _, value, defined in found["symbols"] if defined]
    base = ctypes.cast(getattr(library, runtime.SYMBOL), ctypes.c_void_p).value - entry
    callbacks = dict(zip(program.stand_ins(), program._callbacks, strict=False))
    patched = 0
    for place, _, number, _ in found["relocations"]:
        callback = callbacks.get(found["symbols"][number][0])
        if callback is not None:
            ctypes.c_void_p.from_address(base + place).value = ctypes.cast(callback, ctypes.c_void_p).value
            patched += 1
    assert patched >= 6
    program._function = launcher
    return program


@on_x86_64
def test_a_loaded_file_is_right(tmp_path, monkeypatch):
    """The shared object's own code decides the launch that is interpreted."""
    artifact, program = built(), host_program(tmp_path / "k.so", COMBINE)
    monkeypatch.setattr(artifact, "_simulator_host", program, raising=False)
    parts, part_lse, out, lse = given = inputs()
    launch(artifact, (*given, None, None, None), names=CombineArguments._fields, outputs={"out": out, "lse": lse})
    expected, expected_lse = reference.combine(parts, part_lse.transpose(2, 3))
    assert torch.allclose(out.float(), expected, atol=0.02)
    assert torch.allclose(lse, expected_lse.transpose(1, 2), atol=1e-4)
    assert len(program.launches) == 1


@on_x86_64
def test_a_loaded_file_takes_a_call_of_the_public_functions(tmp_path, monkeypatch):
    """Groups of arguments included, of which some are empty."""
    problem = AttentionProblem("bfloat16", 64, 64, mask="causal", lse=True, packed_q=True, packed_k=True)
    artifact, program = built(problem), host_program(tmp_path / "k.so", problem)
    monkeypatch.setattr(artifact, "_simulator_host", program, raising=False)
    asked = []
    monkeypatch.setattr(attention, "artifact", lambda problem, arch: asked.append(problem) or artifact)
    q, k, v = rand("cpu", 50, 2, 64), rand("cpu", 90, 1, 64), rand("cpu", 90, 1, 64)
    with simulate(ARCH):
        assert_right(q, k, v, cu_seqlens_q=marks("cpu", 17, 33), cu_seqlens_k=marks("cpu", 60, 30), causal=True)
    assert asked == [problem] and len(program.launches) == 1


@pytest.fixture
def emulated():
    """(the AArch64 file in an emulator, the simulator's CUDA runtime beneath it, errors that it raised)."""
    pytest.importorskip("unicorn")
    program, raised = HostProgram(built()), []

    def taking(function, *types):
        return lambda *registers: function(*registers[: len(types)])

    def error(kind, message, *_):
        raised.append(ctypes.string_at(message).decode())
        return 0

    def error_in_parts(kind, parts, count, *_):
        raised.append(b"".join(filter(None, (ctypes.c_char_p * count).from_address(parts))).decode())
        return 0

    imports = {name: taking(*stand_in) for name, stand_in in program.stand_ins().items()}
    imports["TVMFFIEnvGetStream"] = lambda *_: 0
    imports["TVMFFIErrorSetRaisedFromCStr"] = error
    imports["TVMFFIErrorSetRaisedFromCStrParts"] = error_in_parts
    return Emulated(file_of("aarch64"), imports), program, raised


def as_argument(value, machine):
    """As TVM FFI passes it, in the emulator's memory."""
    if value is None:
        return Argument(0, 0, 0)
    code, bits = _dlpack_type(value.dtype)
    shape, strides = (machine.put(struct.pack(f"<{value.ndim}q", *each)) for each in (value.shape, value.stride()))
    tensor = _DLTensor(value.data_ptr(), 2, 0, value.ndim, code, bits, 1, shape, strides, 0)
    return Argument(7, 0, machine.put(bytes(tensor)))


def without_padding(launched, program, call):
    """A kernel's parameters: of each tensor its address, sizes of 4 bytes and strides of 8, which start at whole 8."""
    parts = []
    for parameter, tensor in zip(program.kernels[launched.kernel].params, call, strict=False):
        content = launched.params[parameter.offset : parameter.offset + parameter.size]
        sizes = 8 + 4 * tensor.ndim
        assert int.from_bytes(content[:8], "little") == tensor.data_ptr()
        parts.append(content[:sizes] + content[-(-sizes // 8) * 8 :])
    return parts


def test_aarch64_asks_for_the_same_launch(emulated):
    machine, program, raised = emulated
    call = (*inputs(), None, None, None)
    program.launches = []
    for _ in range(2):
        assert machine.call(runtime.SYMBOL, [as_argument(each, machine) for each in call]) == 0 and not raised
    (expected,) = HostProgram(built())(*call)
    assert len(program.launches) == 2 and expected.grid != (1, 1, 1)
    for found in program.launches:
        assert replace(found, params=b"") == replace(expected, params=b"")
        assert without_padding(found, program, call) == without_padding(expected, program, call)
    assert "_cudaLibraryGetKernel" in machine.calls


def test_aarch64_refuses_what_the_problem_does_not_take(emulated):
    machine, program, raised = emulated
    program.launches = []
    assert machine.call(runtime.SYMBOL, [as_argument(None, machine)] * 3) == -1
    wrong = [torch.zeros(2, 2).bfloat16(), *inputs()[1:], None, None, None]
    assert machine.call(runtime.SYMBOL, [as_argument(each, machine) for each in wrong]) == -1
    assert not program.launches
    assert raised[0].startswith("Expects 7 parameters") and "expected ndim=5" in raised[1]


@pytest.mark.parametrize("host", ["x86_64", "aarch64"])
def test_what_the_linker_does_not_know_is_refused(host):
    good = export.to_object(built(), host)
    shared_object.link(good, runtime.SYMBOL, runtime.NEEDED)
    with pytest.raises(shared_object.NotLinkable, match="expected a function other"):
        shared_object.link(good, "other", runtime.NEEDED)
    for wrong in (b"", good[:40], b"\x7fELF\x01" + good[5:], good[:18] + b"\x08\x00" + good[20:]):
        with pytest.raises(shared_object.NotLinkable, match="expected a"):
            shared_object.link(wrong, runtime.SYMBOL, runtime.NEEDED)
    (table,) = [each for each in shared_object.read_sections(good) if each.name in (".rela.text", ".rela.ltext")]
    unknown = bytearray(good)
    struct.pack_into("<I", unknown, table.offset + 8, 127)
    with pytest.raises(shared_object.NotLinkable, match="relocation 127"):
        shared_object.link(bytes(unknown), runtime.SYMBOL, runtime.NEEDED)
