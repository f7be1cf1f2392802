"""Where kernels come from, for doctor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def describe_sources(arch: str | None = None) -> list[str]:
    """In general, or of the kernels of known models for a target."""
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
