"""The commands about kernels in files: compile --out, cache, and what doctor says of both."""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flash_attn_sm120.terminal import paint, progress, table

HOSTS = ("x86_64", "aarch64")


def add_compile_options(
    parser: argparse.ArgumentParser, arches: Sequence[str], report: Callable[[Sequence[str]], int]
) -> None:
    """report: what runs without --out, for some of `arches`."""
    parser.add_argument(
        "--arch", type=_names, default=tuple(arches), help="targets, comma between them (default: sm_120a,sm_121a)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the kernels that wheels carry into files here")
    parser.add_argument(
        "--host",
        type=_names,
        default=HOSTS,
        help="with --out: processors that the files are for (default: x86_64,aarch64)",
    )
    parser.add_argument(
        "--jobs", type=int, default=0, help="with --out: compilers at a time (default: as memory allows)"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="with --out: variants with this in their description"
    )

    parser.add_argument(
        "--cuda", type=int, choices=(12, 13), default=0, help="with --out: the compiler's CUDA (default: the newest)"
    )

    def run(arguments: argparse.Namespace) -> int:
        if arguments.out is None:
            for name in arguments.arch:
                if name not in arches:
                    parser.error(f"argument --arch: expected {' or '.join(arches)}, got {name!r} (with --out, any)")
            return report(arguments.arch)
        for name in arguments.arch:
            if not re.fullmatch(r"sm_(8\d|9\da|1\d\da)", name):
                parser.error(f"argument --arch: expected targets such as sm_120a, got {name!r}")
        for name in arguments.host:
            if name not in HOSTS:
                parser.error(f"argument --host: expected {' or '.join(HOSTS)}, got {name!r}")
        more = (arguments.jobs, arguments.only, arguments.cuda)
        return run_precompile(arguments.arch, arguments.host, arguments.out, *more)

    parser.set_defaults(run=run)


def add_cache_command(commands: Any) -> None:
    """commands: of ArgumentParser.add_subparsers."""
    parser = commands.add_parser("cache", help="show the compiled kernels in the cache directory, or remove them")
    parser.add_argument("action", nargs="?", choices=("show", "clear"), default="show")
    parser.set_defaults(run=lambda arguments: clear_cache() if arguments.action == "clear" else show_cache())


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def run_precompile(
    arches: Sequence[str], hosts: Sequence[str], folder: Path, jobs: int = 0, only: str = "", cuda: int = 0
) -> int:
    """Files of the shipped variants. 1 if one can't be made."""
    from flash_attn_sm120.labels import label
    from flash_attn_sm120.precompile import MANIFEST, precompile, write_manifest
    from flash_attn_sm120.shipped import shipped_variants

    problems = [problem for problem in shipped_variants() if only in label(problem)]
    made = precompile(problems, arches, hosts, folder, jobs, cuda)
    errors = [each.error for each in progress(made, "compile", len(problems) * len(arches)) if each.error]
    for error in errors:
        print(paint(error, "red"))
    rows = write_manifest(problems, arches, hosts, folder)
    size = sum(int(row["bytes"]) for row in rows)
    print(f"{len(rows)} files of {len(problems)} variants, {size / 2**20:.1f} MB, listed in {folder / MANIFEST}")
    return 1 if errors or not rows else 0


def show_cache() -> int:
    """What is kept, the one used last first. 1 where there is no cache, with the reason."""
    from flash_attn_sm120 import cache

    kept, reason = cache.open_cache()
    if kept is None:
        print(paint(f"No cache: {reason}.", "red"))
        return 1
    entries = kept.entries()
    rows = []
    for entry in entries:
        key = entry.key or {}
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        rows.append((key.get("target", "-"), key.get("variant", "damaged"), f"{entry.size / 1024:.0f}", used))
    if rows:
        print(table(("target", "variant", "KB", "last used"), rows))
    total = sum(entry.size for entry in entries)
    print(f"{len(entries)} kernels, {total / 2**20:.1f} of {kept.limit / 2**20:.0f} MB, in {kept.folder}")
    return 0


def clear_cache() -> int:
    """Removes every kernel. 1 where there is no cache, or where it can't be written to."""
    from flash_attn_sm120 import cache

    kept, reason = cache.open_cache()
    if kept is not None:
        try:
            count, total = kept.clear()
        except OSError as error:
            reason = str(error)
        else:
            print(f"Removed {count} kernels, {total / 2**20:.1f} MB, from {kept.folder}.")
            return 0
    print(paint(f"Nothing removed: {reason}.", "red"))
    return 1


def describe_sources(arch: str | None = None) -> list[str]:
    """Where kernels come from, for doctor: in general, or those of a target."""
    from flash_attn_sm120 import cache, kernel_file, loader

    folder, host = loader.precompiled_folder(), kernel_file.host()
    lines = []
    if arch is None:
        brought = Counter(key["target"] for key in _keys(folder) if key.get("host") == host)
        listed = ", ".join(f"{count} for {target}" for target, count in sorted(brought.items()))
        lines.append(f"kernels that came with the package: {listed or 'none'}")
        kept, reason = cache.open_cache()
        lines.append(f"cache: {len(kept.entries())} kernels in {kept.folder}" if kept else f"no cache: {reason}")
        if not loader.jit_allowed():
            lines.append(f"{loader.NO_JIT} is set: what isn't in a file is an error")
        return lines
    from flash_attn_sm120.shipped import MODELS

    for name, shapes in MODELS.items():
        found = Counter(loader.source_of(problem, arch) for problem in shapes.problems())
        lines.append(f"{name}: " + ", ".join(f"{count} {source}" for source, count in found.items()))
    return lines


def _keys(folder: Path) -> list[dict[str, str]]:
    """Of the whole files in a folder."""
    from flash_attn_sm120 import kernel_file

    keys = []
    for path in folder.glob(f"*{kernel_file.SUFFIX}"):
        try:
            keys.append(kernel_file.read_key(path.read_bytes()))
        except (OSError, ValueError):
            continue
    return keys
