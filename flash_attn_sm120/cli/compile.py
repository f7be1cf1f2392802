"""flash-attn-sm120 compile: every kernel, what it takes of an SM and what its loop can reach."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from flash_attn_sm120.cli.precompile import HOSTS, run_precompile
from flash_attn_sm120.cli.words import add_command
from flash_attn_sm120.labels import label
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.terminal import paint, progress, table

ARCHES = ("sm_120a", "sm_121a")
DESCRIPTION = """\
Compiles every kernel and shows what each takes of an SM, what its loop issues and the share of the mma.sync ceiling
to expect. With --out: writes the kernels that wheels carry into files, with a manifest of hashes; files that are
there and were made from the same sources stay. Needs no GPU; takes some minutes.
"""
EPILOG = """\
examples:
  flash-attn-sm120 compile                    for RTX 50 and RTX PRO (sm_120a) and DGX Spark (sm_121a)
  flash-attn-sm120 compile --arch sm_121a
  flash-attn-sm120 compile --arch sm_120a,sm_121a --host x86_64,aarch64 --out build/kernels

Exit code: 0 if no kernel spills and each keeps two matrix warps on a sub-partition, with --out if every file was made;
1 otherwise.
"""


def add(commands: argparse._SubParsersAction) -> None:
    text = "compile every kernel and show what each takes of an SM, or make files of them; needs no GPU"
    parser = add_command(commands, "compile", text, DESCRIPTION, EPILOG)
    parser.add_argument(
        "--arch", type=_names, default=ARCHES, help="targets, comma between them (default: sm_120a,sm_121a)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the kernels that wheels carry into files here")
    parser.add_argument(
        "--host", type=_names, help="with --out: processors that the files are for (default: x86_64,aarch64)"
    )
    parser.add_argument("--jobs", type=int, help="with --out: compilers at a time (default: as memory allows)")
    parser.add_argument("--only", metavar="TEXT", help="with --out: variants with this in their description")
    parser.add_argument(
        "--cuda", type=int, choices=(12, 13), help="with --out: the compiler's CUDA (default: the newest)"
    )
    parser.set_defaults(run=lambda arguments: run(arguments, parser))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The report, or with --out the files. parser: for what is wrong in the command line."""
    if arguments.out is None:
        for name in ("host", "jobs", "only", "cuda"):
            if getattr(arguments, name) is not None:
                parser.error(f"argument --{name}: expected --out beside it")
        for name in arguments.arch:
            if name not in ARCHES:
                parser.error(f"argument --arch: expected {' or '.join(ARCHES)}, got {name!r} (with --out, any)")
        return report(arguments.arch)
    for name in arguments.arch:
        if not re.fullmatch(r"sm_(8\d|9\da|1\d\da)", name):
            parser.error(f"argument --arch: expected targets such as sm_120a, got {name!r}")
    hosts = arguments.host or HOSTS
    for name in hosts:
        if name not in HOSTS:
            parser.error(f"argument --host: expected {' or '.join(HOSTS)}, got {name!r}")
    more = (arguments.jobs or 0, arguments.only or "", arguments.cuda or 0)
    return run_precompile(arguments.arch, hosts, arguments.out, *more)


def report(arches: Sequence[str]) -> int:
    """Every variant for each target. 1 if one spills or keeps fewer than two matrix warps on a sub-partition."""
    from flash_attn_sm120.sass import GET_NVDISASM, find_nvdisasm
    from flash_attn_sm120.static_model import ASSUMPTIONS
    from flash_attn_sm120.variants import changed_variants, dual_group_variants, variants

    problems = (*variants(), *changed_variants(), *dual_group_variants())
    jobs = [(arch, problem) for arch in arches for problem in problems]
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
