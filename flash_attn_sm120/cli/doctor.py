"""flash-attn-sm120 doctor: what is here, what will be used and why."""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from flash_attn_sm120 import __version__
from flash_attn_sm120.cli.sources import describe_sources
from flash_attn_sm120.cli.words import add_command, verdict
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.terminal import paint

PACKAGES = ("torch", "nvidia-cutlass-dsl", "apache-tvm-ffi")
DESCRIPTION = """\
Says which packages, driver and GPUs are here and what each GPU will run, and makes one small call on each GPU.
"""
EPILOG = """\
Exit code: 0 if a call works on every GPU, 1 if one doesn't or there is none; the last line has the reason.
"""


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "doctor", "say what is here, what will be used and why", DESCRIPTION, EPILOG)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints what is here in plain words. 1 where a call can't work, with the reason."""
    system = f"{platform.system()} {platform.machine()}"
    print(f"flash_attn_sm120 {__version__} on Python {platform.python_version()}, {system}")
    missing = []
    for package in PACKAGES:
        version = _version(package)
        print(f"  {package}: {version or paint('not installed', 'red')}")
        if version is None:
            missing.append(package)
    libraries = [name for name in ("cu12", "cu13") if _version(f"nvidia-cutlass-dsl-libs-{name}")]
    print(f"  compiler libraries: {', '.join(libraries) or 'none'}")
    print(f"  NVIDIA driver: {_driver() or 'none found'}")
    for line in describe_sources():
        print(f"  {line}")
    if missing:
        return verdict(f"{', '.join(missing)} must be installed: pip install flash-attn-sm120")

    import torch

    print(f"  torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "  torch is built without CUDA")
    if not torch.cuda.is_available():
        reason = "no GPU that PyTorch can use"
        if _driver() and not torch.version.cuda:
            reason += ": the driver is there, but this PyTorch is a CPU build"
        print("Without one, `flash-attn-sm120 compile` still compiles every kernel and shows what each one costs.")
        return verdict(reason)
    return _gpus()


def _gpus() -> int:
    import torch

    bad = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = torch.cuda.get_device_capability(index)
        memory = properties.total_memory / 2**30
        print(f"GPU {index}: {properties.name}, compute capability {capability[0]}.{capability[1]}, {memory:.0f} GiB")
        for line in explain(capability):
            print(f"  {line}")
        if capability < (8, 0):
            bad.append(f"GPU {index} is too old")
            continue
        try:
            difference = _trial(torch.device("cuda", index))
        except Exception as error:
            print(f"  a small call: {paint('failed', 'red')}, {type(error).__name__}: {error}")
            bad.append(f"a small call failed on GPU {index}")
            continue
        right = difference <= 0.0156
        print(f"  a small call: {paint('right', 'green') if right else paint('wrong', 'red')}, off by {difference:.5f}")
        if not right:
            bad.append(f"a small call was wrong on GPU {index}")
    return verdict("; ".join(bad))


def explain(capability: tuple[int, int]) -> list[str]:
    """What a GPU of this compute capability will run, and why, in plain words."""
    from flash_attn_sm120.dispatch import choose

    major, minor = capability
    if capability < (9, 0):
        return ["can't be used: the kernels wait at mbarriers by an instruction that came with 9.0"]
    lines = []
    if major == 12:
        lines.append("this is what the kernels are made for")
    else:
        lines.append("runs the same kernels with SM120's tiles, which aren't the best for this chip")
    target = f"sm_{major}{minor}a"
    plan = choose(AttentionProblem("bfloat16", 128, 128, mask="causal"), target)
    lines.append(f"its target is {target}; kernels come from files, or from the compiler at the first call of a kind:")
    lines += [f"  {line}" for line in describe_sources(target)]
    lines.append(
        f"a causal bfloat16 call of head_dim 128 uses the {plan.kernel} kernel: {plan.tile_m} x {plan.tile_n} tiles, "
        f"{plan.num_warps} warps, {plan.smem_bytes / 1024:.0f} KB of shared memory"
    )
    return lines


def _trial(device) -> float:
    import torch

    from flash_attn_sm120 import flash_attn_func
    from flash_attn_sm120.matrix import largest_difference
    from flash_attn_sm120.reference import attention

    q, k, v = (torch.randn(1, 129, heads, 128, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2))
    return largest_difference(flash_attn_func(q, k, v, causal=True), attention(q, k, v, causal=True)[0])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The kernel module says its version; under WSL only nvidia-smi does."""
    file = Path("/sys/module/nvidia/version")
    if file.exists():
        return file.read_text().strip()
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None
