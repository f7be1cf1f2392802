"""flash-attn-sm120, or python -m flash_attn_sm120: doctor, check, compile, cache."""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from flash_attn_sm120 import __version__, cli_kernels
from flash_attn_sm120.labels import label
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.terminal import paint, progress, table

if TYPE_CHECKING:
    from flash_attn_sm120.matrix import Result

ARCHES = ("sm_120a", "sm_121a")
PACKAGES = ("torch", "nvidia-cutlass-dsl", "apache-tvm-ffi")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 when all is well, 1 when something isn't, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="flash-attn-sm120", description="Attention on NVIDIA SM120 and SM121.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="say what is here, what will be used and why")
    doctor.set_defaults(run=lambda arguments: run_doctor())

    check = commands.add_parser("check", help="run the 64-config matrix against float32, on a GPU or in the simulator")
    check.add_argument(
        "--device", default="auto", help="such as cuda:1, or simulator (default: a GPU where there is one)"
    )
    check.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    check.set_defaults(run=lambda arguments: run_check(arguments.device, arguments.seed))

    compile_ = commands.add_parser(
        "compile", help="compile every kernel and show what each takes of an SM, or make files of them; needs no GPU"
    )
    cli_kernels.add_compile_options(compile_, ARCHES, run_compile)
    cli_kernels.add_cache_command(commands)

    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def run_doctor() -> int:
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
    for line in cli_kernels.describe_sources():
        print(f"  {line}")
    if missing:
        return _verdict(f"{', '.join(missing)} must be installed: pip install flash-attn-sm120")

    import torch

    print(f"  torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "  torch is built without CUDA")
    if not torch.cuda.is_available():
        reason = "no GPU that PyTorch can use"
        if _driver() and not torch.version.cuda:
            reason += ": the driver is there, but this PyTorch is a CPU build"
        print("Without one, `flash-attn-sm120 compile` still compiles every kernel and shows what each one costs.")
        return _verdict(reason)
    return _doctor_gpus()


def _doctor_gpus() -> int:
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
    return _verdict("; ".join(bad))


def explain(capability: tuple[int, int]) -> list[str]:
    """What a GPU of this compute capability will run, and why, in plain words."""
    from flash_attn_sm120.dispatch import choose

    major, minor = capability
    if capability < (8, 0):
        return ["can't be used: the kernels need cp.async and bfloat16 matrix instructions, which came with 8.0"]
    lines = []
    if major == 12:
        lines.append("this is what the kernels are made for")
    else:
        lines.append("runs the same kernels with SM120's tiles, which aren't the best for this chip")
    target = f"sm_{major}{minor}{'a' if major >= 9 else ''}"
    plan = choose(AttentionProblem("bfloat16", 128, 128, mask="causal"), target)
    lines.append(f"its target is {target}; kernels come from files, or from the compiler at the first call of a kind:")
    lines += [f"  {line}" for line in cli_kernels.describe_sources(target)]
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


def _verdict(problem: str) -> int:
    print(paint(f"Not ready: {problem}.", "red") if problem else paint("Ready.", "green"))
    return 1 if problem else 0


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


def run_check(device: str, seed: int) -> int:
    """The 64-config matrix on a GPU, or with short lengths in the simulator. 1 if a configuration fails."""
    import torch

    from flash_attn_sm120 import matrix

    gpu = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if gpu else "simulator"
    if device == "simulator":
        from flash_attn_sm120.simulator import simulate

        print("check: every kernel interpreted from its sm_120a PTX, short lengths, no GPU")
        with simulate("sm_120a"):
            results = [matrix.run(config, "cpu", "short", seed) for config in progress(matrix.configs(), "check")]
    elif not gpu or torch.device(device).type != "cuda":
        return _verdict(f"there is no {device} that PyTorch can use (see doctor; --device simulator needs no GPU)")
    else:
        print(f"check: on {torch.cuda.get_device_name(device)}")
        results = [matrix.run(config, device, seed=seed) for config in progress(matrix.configs(), "check")]
    return _show_results(results)


def _show_results(results: list[Result]) -> int:
    from flash_attn_sm120.matrix import MAX_DIFF

    rows, colours = [], []
    for result in results:
        numbers = (result.max_diff, result.same_dtype_diff, result.lse_diff)
        verdict = "; ".join(result.complaints) or "pass"
        rows.append((result.config.name, *(f"{n:.5f}" for n in numbers), verdict))
        colours.append(None if result.passed else "red")
    print(table(("configuration", "max diff", "of PyTorch", "of lse", "verdict"), rows, colours))
    passed = sum(result.passed for result in results)
    limit = f"{MAX_DIFF} and twice the error of PyTorch in the same dtype"
    print(paint(f"{passed} of {len(results)} within {limit}", "green" if passed == len(results) else "red"))
    return 0 if passed == len(results) else 1


def run_compile(arches: Sequence[str]) -> int:
    """Every variant for each target. 1 if one spills or keeps fewer than two matrix warps on a sub-partition."""
    from flash_attn_sm120.sass import GET_NVDISASM, find_nvdisasm
    from flash_attn_sm120.static_model import ASSUMPTIONS
    from flash_attn_sm120.variants import changed_variants, variants

    jobs = [(arch, problem) for arch in arches for problem in (*variants(), *changed_variants())]
    measured = [measure(problem, arch) for arch, problem in progress(jobs, "compile")]
    header = (
        "target", "variant", "kernel", "tile", "warps", "registers", "stack", "shared KB", "blocks/SM",
        "warps/sub-partition", "HMMA", "slots/HMMA", "rescale", "% at 16", "% at 32", "binds", "verdict",
    )  # fmt: skip
    print(table(header, [row for row, _ in measured], [None if good else "red" for _, good in measured]))
    print(ASSUMPTIONS if find_nvdisasm() else f"No predictions: there is no nvdisasm here; {GET_NVDISASM}.")
    failed = sum(not good for _, good in measured)
    text = (
        f"{len(measured) - failed} of {len(measured)} without a stack and with two matrix warps a sub-partition or more"
    )
    print(paint(text, "red" if failed else "green"))
    return 1 if failed else 0


def measure(problem: AttentionProblem, arch: str) -> tuple[tuple[str, ...], bool]:
    """Compiles one variant: (its row of the table, whether it passes)."""
    from flash_attn_sm120 import cubin
    from flash_attn_sm120.compile import build_best
    from flash_attn_sm120.occupancy import RESERVED_BYTES, SUB_PARTITIONS, occupancy

    built, plan = build_best(problem, arch, keep=True)
    binary = built.__cubin__
    kernels = cubin.read(binary)
    registers = max(kernel.registers for kernel in kernels)
    stack = max(kernel.stack_bytes for kernel in kernels)
    # From sm_90 on, a kernel's static shared memory counts the reserved KB.
    static = max(max(kernel.shared_bytes for kernel in kernels) - RESERVED_BYTES, 0)
    shared = plan.smem_bytes + static
    held = occupancy(registers, plan.num_warps + plan.loading_warps, shared, plan.num_warps)
    complaints = []
    if stack:
        complaints.append("spills")
    if held.matrix_warps < 2 * SUB_PARTITIONS:
        complaints.append(f"too few matrix warps ({held.limit})")
    elif held.blocks < plan.blocks_per_sm:
        complaints.append(f"{plan.blocks_per_sm} blocks planned ({held.limit})")
    row = (
        arch, label(problem), plan.kernel, f"{plan.tile_m}x{plan.tile_n}", plan.num_warps, registers, stack,
        f"{shared / 1024:.1f}", held.blocks, f"{held.warps_a_sub_partition:g}",
        *_predicted(binary, int(held.warps_a_sub_partition)), ", ".join(complaints) or "ok",
    )  # fmt: skip
    return tuple(map(str, row)), not complaints


def _predicted(binary: bytes, warps: int) -> tuple[str, ...]:
    """The static model's cells. Its columns are for reading: they don't change the verdict."""
    from flash_attn_sm120.sass import NotAvailable
    from flash_attn_sm120.static_model import predict

    try:
        if not warps:
            raise NotAvailable("an SM holds no block")
        found = predict(binary, warps)
    except NotAvailable as reason:
        return ("-", "-", "-", "-", "-", f"not available: {reason}")
    percents = (f"{percent:.0f}" for percent in found.percent.values())
    binds = " / ".join(dict.fromkeys(found.binds.values()))
    return (str(found.hmma), f"{found.other / found.hmma:.2f}", str(found.rescale), *percents, binds)
