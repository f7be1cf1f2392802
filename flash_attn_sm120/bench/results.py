"""Result files: what a benchmark script wrote, or `flash-attn-sm120 bench` with one such part a section."""

from __future__ import annotations

import json
from pathlib import Path

SECTIONS = ("forward", "prefill", "decode")


def load(path: Path) -> dict[str, dict]:
    """{section: results} of a file. Raises ValueError where it is no result file, OSError where it can't be read."""
    try:
        found = json.loads(path.read_text())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got other bytes") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got a text that breaks at line {error.lineno}") from error
    if isinstance(found, dict) and "rows" in found:
        found = {name: found for name in SECTIONS if _is(name, found)}
    sections = {name: found[name] for name in SECTIONS if name in found} if isinstance(found, dict) else {}
    if not sections or not all(_is(name, part) for name, part in sections.items()):
        raise ValueError(f"{path}: expected results of forward, prefill or decode, got none")
    return sections


def _is(section: str, found: object) -> bool:
    """Whether these are results of that section, which each have keys of their own."""
    of_all, of_row = {
        "forward": ({"mma_tflops", "peers"}, {"cell", "tflops", "ms", "ratio"}),
        "prefill": (set(), {"cell", "tflops", "page_size"}),
        "decode": ({"read_tb_s"}, {"cell", "graph_tb_s", "eager_us"}),
    }[section]
    if not isinstance(found, dict) or not of_all <= found.keys():
        return False
    rows = found.get("rows")
    return bool(rows) and isinstance(rows, list) and all(isinstance(row, dict) and of_row <= row.keys() for row in rows)


def conditions(found: dict) -> str:
    """Where and how a section was measured, in one sentence."""
    device = found.get("device", "an unrecorded GPU")
    words = {
        "sm120": "SM120's tiles and no more blocks an SM than SM120 holds",
        "device": "SM120's tiles and as many blocks an SM as fit there",
    }
    how = words.get(found.get("occupancy", ""), "SM120's tiles")
    torch = f", torch {found['torch']}" if "torch" in found else ""
    return f"Measured on {device}{torch}; this package with {how}, the others as they are."
