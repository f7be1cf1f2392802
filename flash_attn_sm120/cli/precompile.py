"""flash-attn-sm120 compile --out: the kernels that wheels carry, as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flash_attn_sm120.terminal import paint, progress

HOSTS = ("x86_64", "aarch64")


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
