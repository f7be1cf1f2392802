"""vLLM 0.24.0 as small as it generates text on one kind of GPU: for a machine with PyTorch 2.11.0 and no network.

    python tests/integration/pack_vllm.py OUT_DIR [--capability 90] [--python 3.12]

OUT_DIR/vllm.tar.xz: vLLM's Python, its compiled ops with the code of other GPUs set to zeros, and the packages of
vllm_gpu_requirements.txt. In place of vLLM's FlashAttention is an empty module, which the others import
and don't use.
OUT_DIR/vllm-flash-attn-3.tar.xz: FlashAttention 3 of compute capability 9.0, for the backend FLASH_ATTN.
OUT_DIR/vllm-flash-attn-2.tar.xz: FlashAttention 2 for it, whose PTX a GPU of 9.0 compiles when it is first called.

All unpack into one folder, which goes on PYTHONPATH. Takes 5 minutes on 2 cores and 1.5 GB; prints the sizes.
"""

import argparse
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

VERSION = "0.24.0"
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)))
REQUIREMENTS = Path(__file__).with_name("vllm_gpu_requirements.txt")
OPS = ("vllm/_C_stable_libtorch.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so")
SMALL = ("vllm/cumem_allocator.abi3.so", "vllm/spinloop.abi3.so")
FLASH_ATTN = {version: f"vllm/vllm_flash_attn/_vllm_fa{version}_C.abi3.so" for version in (2, 3)}
STAND_IN = "vllm/vllm_flash_attn/_vllm_fa2_C.py"
KEPT = (".py", ".json", "/METADATA", "/entry_points.txt")
LEFT_OUT = (
    "/fused_moe/configs/", "/quantization/utils/configs/", "/static/",
    "vllm/third_party/fmha_sm100/", "vllm/third_party/deep_gemm/",
)  # fmt: skip
# The CUDA binaries that nvcc puts into a library, as cuobjdump reads them.
FATBIN = struct.pack("<IHH", 0xBA55ED50, 1, 16)
PTX, CUBIN = 1, 2


class Code(NamedTuple):
    """Of one GPU, at bytes [start, stop) of a library. kind: PTX or CUBIN. capability: such as 90."""

    start: int
    stop: int
    kind: int
    capability: int


def fatbins(library: bytes) -> Iterator[list[Code]]:
    """The codes that a GPU has the choice of, for each source file of a library."""
    at = 0
    while (at := library.find(FATBIN, at)) >= 0:
        place, codes = at + 16, []
        at = place + struct.unpack_from("<Q", library, at + 8)[0]
        while place < at:
            kind, _, header, size = struct.unpack_from("<HHIQ", library, place)
            (capability,) = struct.unpack_from("<I", library, place + 28)
            start, place = place + header, place + header + size
            codes.append(Code(start, place, kind, capability))
        yield codes


def used(codes: list[Code], capability: int) -> list[Code]:
    """What a GPU runs: binaries of its generation up to its own, or where there is none the latest PTX before."""
    lowest = capability // 10 * 10
    own = [code for code in codes if code.kind == CUBIN and lowest <= code.capability <= capability]
    if own:
        return own
    before = [code for code in codes if code.kind == PTX and code.capability <= capability]
    return [code for code in before if code.capability == max(other.capability for other in before)]


def pruned(library: bytes, capability: int) -> bytes:
    """The library with zeros for the code that one GPU doesn't use; nothing moves."""
    result = bytearray(library)
    for codes in fatbins(library):
        kept = used(codes, capability)
        for code in codes:
            if code not in kept:
                result[code.start : code.stop] = bytes(code.stop - code.start)
    return bytes(result)


def download(folder: Path, python: str) -> tuple[Path, list[Path]]:
    """vLLM's wheel and those of the requirements."""
    target = [
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        python,
        "--implementation",
        "cp",
        "-d",
        str(folder),
    ]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "download", *target]
    subprocess.run([*pip, f"vllm=={VERSION}", "-r", str(REQUIREMENTS)], check=True)
    wheels = sorted(folder.glob("*.whl"))
    (own,) = (wheel for wheel in wheels if wheel.name.startswith("vllm-"))
    return own, [wheel for wheel in wheels if wheel != own]


def unpack_vllm(wheel: Path, site: Path, flash_attn: dict[int, Path], capability: int) -> None:
    """flash_attn: a folder for each of FLASH_ATTN."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(KEPT) and not any(p in name for p in LEFT_OUT)]
        archive.extractall(site, [*names, *SMALL])
        parts = [
            *((name, site) for name in OPS),
            *((FLASH_ATTN[version], flash_attn[version]) for version in FLASH_ATTN),
        ]
        for name, folder in parts:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(pruned(archive.read(name), capability))
    (site / STAND_IN).write_text('"""Stands where vLLM\'s compiled FlashAttention 2 was left out."""\n')


def pack(folder: Path, archive: Path) -> None:
    """A tar.xz of what is in a folder."""
    with archive.open("wb") as file:
        tar = subprocess.Popen(["tar", "c", "-C", str(folder), "."], stdout=subprocess.PIPE)
        subprocess.run(["xz", "-T2", "-9e", "--lzma2=dict=128MiB"], stdin=tar.stdout, stdout=file, check=True)
        if tar.wait():
            raise RuntimeError(f"tar of {folder} failed")
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU, such as 90 or 120 (default 90)")
    parser.add_argument("--python", default="3.12", help="of the machine (default 3.12)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    try:
        vllm, others = download(work / "wheels", options.python)
        site, flash_attn = work / "site", {version: work / f"flash_attn_{version}" for version in FLASH_ATTN}
        unpack_vllm(vllm, site, flash_attn, options.capability)
        for wheel in others:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        pack(site, options.out / "vllm.tar.xz")
        for version, folder in flash_attn.items():
            pack(folder, options.out / f"vllm-flash-attn-{version}.tar.xz")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
