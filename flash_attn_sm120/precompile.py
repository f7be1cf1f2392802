"""Kernels compiled ahead, into a folder with a manifest: what platform wheels carry. Needs no GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flash_attn_sm120 import __version__, kernel_file, runtime
from flash_attn_sm120.kernel_file import Problem
from flash_attn_sm120.labels import label
from flash_attn_sm120.loader import compilers_that_fit

MANIFEST = "manifest.json"
COMPILES_A_PROCESS = 16  # then a fresh one takes its place: a compiler's memory grows from one kernel to the next
HOSTS = ("x86_64", "aarch64")


@dataclass(frozen=True)
class Job:
    """cuda: major release of the compiler, 0 for the one that the DSL takes by itself."""

    problem: Problem
    arch: str
    hosts: tuple[str, ...]
    folder: str
    cuda: int


@dataclass(frozen=True)
class Made:
    """What became of a job. error: "" where all is well."""

    job: Job
    error: str = ""


def precompile(
    problems: Sequence[Problem],
    arches: Sequence[str],
    hosts: Sequence[str],
    folder: Path,
    processes: int = 0,
    cuda: int = 0,
) -> Iterator[Made]:
    """Compiles what the folder lacks; yields each variant and target as it is done. Write the manifest afterwards.

    arches: such as "sm_120a". hosts: of HOSTS. processes: at a time, 0 for as many as processors and memory allow.
    cuda: 12 or 13, the compiler to take, 0 for the one that the DSL takes by itself. Drivers for CUDA 12 and for 13
    load what 12's makes, some of whose kernels have a stack that 13's haven't.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [Job(problem, arch, tuple(hosts), str(folder), cuda) for arch in arches for problem in problems]
    processes = min(processes or compilers_that_fit(), len(jobs)) or 1
    # A fork would take over the state of a compiler that has run here.
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=COMPILES_A_PROCESS) as pool:
        yield from pool.imap_unordered(_make, jobs)


def write_manifest(
    problems: Sequence[Problem], arches: Sequence[str], hosts: Sequence[str], folder: Path
) -> list[dict[str, str | int]]:
    """Lists the whole files of these variants with their hashes, and removes kernels of anything else."""
    rows: list[dict[str, str | int]] = []
    for arch in arches:
        for problem in problems:
            for host in hosts:
                content = _whole(problem, arch, host, folder)
                key = kernel_file.built_in_key(problem, arch, host)
                if content is None or key is None:
                    continue
                digest = hashlib.sha256(content).hexdigest()
                row: dict[str, str | int] = {name: key[name] for name in ("variant", "target", "host", "problem")}
                row["cuda"] = kernel_file.read_note(content)[1]
                rows.append({"file": kernel_file.file_name(key), "sha256": digest, "bytes": len(content), **row})
    listed = {row["file"] for row in rows}
    for path in folder.glob(f"*{kernel_file.SUFFIX}"):
        if path.name not in listed and _is_kernel(path):
            path.unlink()
    versions = {name: metadata.version(name) for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi")}
    head = {"flash_attn_sm120": __version__, **versions, "sources": kernel_file.source_hash()}
    _replace(folder / MANIFEST, json.dumps(head | {"files": rows}, indent=1).encode())
    return rows


def _make(job: Job) -> Made:
    """In a process of its own."""
    folder = Path(job.folder)
    kept = {host: _whole(job.problem, job.arch, host, folder) for host in job.hosts}
    missing = [host for host, content in kept.items() if content is None or not _made_by(content, job.cuda)]
    if not missing:
        return Made(job)
    try:
        if job.cuda:
            take_compiler(job.cuda)
        from flash_attn_sm120 import compile

        built, _ = compile.build_best(job.problem, job.arch)
        for host in missing:
            key = kernel_file.built_in_key(job.problem, job.arch, host)
            if key is None:
                raise ValueError("a function of the caller's isn't kept in files")
            _replace(folder / kernel_file.file_name(key), compile.to_file(built, key))
    except Exception as error:  # the compiler's own errors don't all come through a pipe
        return Made(job, f"{label(job.problem)} for {job.arch}: {type(error).__name__}: {error}")
    return Made(job)


def take_compiler(cuda: int) -> None:
    """Makes the DSL use its libraries for this CUDA where it would take newer ones. Before it is imported.

    Raises RuntimeError where they aren't installed, or the DSL has others already."""
    module = "cutlass._mlir._mlir_libs._cutlass_ir"
    if module in sys.modules:
        if f".cu{cuda}." not in str(sys.modules[module].__file__):
            raise RuntimeError(f"CuTe DSL is loaded, with libraries that aren't for CUDA {cuda}")
        return
    pattern = f"dsl_packages/cutlass/_mlir/_mlir_libs/_cutlass_ir.cu{cuda}.*.so"
    found = [(root, path) for root in runtime.dsl_folders() for path in root.glob(pattern)]
    spec = importlib.util.spec_from_file_location(module, found[0][1]) if found else None
    if spec is None or spec.loader is None:
        raise RuntimeError(
            f"nvidia-cutlass-dsl has no libraries for CUDA {cuda}: pip install nvidia-cutlass-dsl-libs-cu{cuda}"
        )
    os.environ["CUTE_DSL_LIBS"] = str(found[0][0] / f"cu{cuda}" / "lib" / runtime.RUNTIME)
    # The DSL looks for one only where none is loaded.
    loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    vars(importlib.import_module("cutlass._mlir._mlir_libs"))["_cutlass_ir"] = loaded


def _made_by(content: bytes, cuda: int) -> bool:
    return not cuda or kernel_file.read_note(content)[1].startswith(f"{cuda}.")


def _whole(problem: Problem, arch: str, host: str, folder: Path) -> bytes | None:
    """The content of a variant's file where it is there and whole."""
    key = kernel_file.built_in_key(problem, arch, host)
    if key is None:
        return None
    try:
        content = (folder / kernel_file.file_name(key)).read_bytes()
        kernel_file.check(content, key)
    except (OSError, ValueError):
        return None
    return content


def _is_kernel(path: Path) -> bool:
    try:
        kernel_file.read_key(path.read_bytes())
    except ValueError:
        return False
    return True


def _replace(path: Path, content: bytes) -> None:
    rough = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rough.write_bytes(content)
    os.replace(rough, path)
