"""flash-attn-sm120 bench: speed on this GPU beside the other attention packages that are installed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from flash_attn_sm120.cli.words import add_command
from flash_attn_sm120.terminal import paint, progress, table

SECTIONS = ("forward", "prefill", "decode")
DEFAULT = ("forward", "decode")
CELLS = {"standard": "issue", "windows": "windows", "head_dims": "head_dims"}
PEERS = ("sdpa_flash", "sdpa_cudnn", "flash_attn_4", "flash_attn_4_sm120", "flashinfer")
OF_SECTION = {
    "forward": ("sdpa_flash", "flash_attn_4", "flash_attn_4_sm120", "sdpa_cudnn"),
    "prefill": ("flashinfer",),
    "decode": ("sdpa_flash", "flash_attn_4", "sdpa_cudnn", "flashinfer"),
}
GET_MATPLOTLIB = 'pictures need matplotlib: pip install "flash-attn-sm120[bench]"'
DESCRIPTION = """\
Measures this package on this GPU beside the peers that are installed, each checked against ours in the same run:
  forward   dense prefill, TFLOPS, beside PyTorch's SDPA and flash-attn-4, and the mma.sync ceiling of the run
  prefill   from pages of 16 tokens, bf16 and e4m3, TFLOPS, beside our dense kernel and FlashInfer
  decode    from pages of 16 tokens, microseconds and TB/s, beside FlashInfer, SDPA and flash-attn-4 (these two from
            dense K and V), and a plain read of the run
Times are medians of CUDA events, with several sets of inputs in turn.
"""
EPILOG = """\
examples:
  flash-attn-sm120 bench                                     forward and decode, as tables
  flash-attn-sm120 bench forward --peers sdpa_flash --plot forward.png
  flash-attn-sm120 bench forward prefill decode --json speed.json --plot speed.png
  flash-attn-sm120 bench --from speed.json --plot speed.png  the same pictures later, without a GPU
  flash-attn-sm120 bench forward --occupancy sm120           another GPU, held to what SM120's shared memory allows

Exit codes: 0 measured, 1 there is no GPU, a package or a file is missing, or a result differs from ours by more than
rounding; 2 wrong command line.
"""


def add(commands: argparse._SubParsersAction) -> None:
    text = "measure speed on this GPU beside SDPA, flash-attn-4 and FlashInfer; tables, JSON, pictures"
    parser = add_command(commands, "bench", text, DESCRIPTION, EPILOG)
    names = ", ".join(SECTIONS)
    parser.add_argument(
        "sections", nargs="*", type=_section, metavar="SECTION", help=f"{names} (default: forward decode)"
    )
    parser.add_argument(
        "--peers", type=_peers, help=f"comma list of {', '.join(PEERS)}, or none (default: those installed)"
    )
    parser.add_argument("--cells", choices=CELLS, help="which problems forward goes through (default: standard)")
    parser.add_argument(
        "--occupancy",
        choices=("device", "sm120"),
        help="blocks of ours on an SM: as many as fit this GPU, or no more than SM120 holds (default: device)",
    )
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the results, after each measurement")
    parser.add_argument(
        "--plot", type=_picture, metavar="FILE.png", help="draw them; several sections make FILE-SECTION.png"
    )
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="read results instead of measuring")
    parser.set_defaults(run=run)


def _section(text: str) -> str:
    if text not in SECTIONS:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(SECTIONS)}, got {text!r}")
    return text


def _peers(text: str) -> list[str]:
    names = [] if text == "none" else list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"expected none or some of {', '.join(PEERS)}, got {name!r}")
    return names


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


def _picture(text: str) -> Path:
    if not text.endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError(f"expected a name that ends with .png, .svg or .pdf, got {text!r}")
    return _file(text)


def run(arguments: argparse.Namespace) -> int:
    """Measures or reads, prints tables, draws. The exit code."""
    if complaint := _contradiction(arguments):
        return _fail(complaint, 2)
    if arguments.plot and find_spec("matplotlib") is None:
        return _fail(GET_MATPLOTLIB)
    if arguments.source:
        sections, reason = _read(arguments.source, arguments.sections)
    else:
        sections, reason = _measure(arguments)
    if reason:
        return _fail(reason)
    for name, found in sections.items():
        _show(name, found)
    if arguments.plot:
        from flash_attn_sm120.bench.plot import draw_all

        for file in draw_all(sections, arguments.plot):
            print(f"drawn: {file}")
    wrong = [text for found in sections.values() for text in _differences(found)]
    return _fail("; ".join(wrong)) if wrong else 0


def _fail(reason: str, code: int = 1) -> int:
    print(f"bench: {reason}", file=sys.stderr)
    return code


def _contradiction(arguments: argparse.Namespace) -> str:
    """Why these options can't all be honoured, "" if they can."""
    sections = arguments.sections or DEFAULT
    if arguments.source:
        given = [name for name in ("peers", "cells", "occupancy", "json") if getattr(arguments, name) is not None]
        return f"--from reads what was measured: expected no --{given[0]} beside it" if given else ""
    if arguments.cells and "forward" not in sections:
        return "--cells: expected forward among the sections, whose problems these are"
    for name in arguments.peers or ():
        if not any(name in OF_SECTION[section] for section in sections):
            return f"--peers: expected peers that {' or '.join(sections)} is compared with, got {name}"
    return ""


def _read(source: Path, wanted: list[str]) -> tuple[dict[str, dict], str]:
    """({section: results}, why there are none)."""
    from flash_attn_sm120.bench import results

    try:
        sections = results.load(source)
    except (OSError, ValueError) as error:
        return {}, str(error)
    if missing := [name for name in wanted if name not in sections]:
        return {}, f"{source} has no {' and no '.join(missing)}"
    return {name: sections[name] for name in wanted or sections}, ""


def _measure(arguments: argparse.Namespace) -> tuple[dict[str, dict], str]:
    """({section: results}, why there are none)."""
    import torch

    if not torch.cuda.is_available():
        return {}, "there is no GPU that PyTorch can use (see doctor; --from FILE shows stored results without one)"
    if torch.cuda.get_device_capability() < (9, 0):
        return {}, f"{torch.cuda.get_device_name()} is too old: compute capability 9.0 or later is needed"
    from flash_attn_sm120.bench import peers

    absent = [name for name in PEERS if not peers.installed(name)]
    if arguments.peers is None:
        have = [name for name in PEERS if name not in absent]
        packages = dict.fromkeys(peers.PACKAGES[name][1] for name in absent)
        if packages:
            print(paint(f"not installed, so not compared: {', '.join(packages)}", "dim"))
    else:
        have = arguments.peers
        if missing := [name for name in have if name in absent]:
            return {}, "; ".join(f"{name} needs pip install {peers.PACKAGES[name][1]}" for name in missing)
    if arguments.occupancy != "sm120":
        have = [name for name in have if name != "flash_attn_4_sm120" or arguments.peers]
    sections: dict[str, dict] = {}
    for section in arguments.sections or DEFAULT:

        def save(found: dict, section: str = section) -> None:
            sections[section] = found
            if arguments.json:
                arguments.json.write_text(json.dumps(sections, indent=1))

        def watch(cells: list, section: str = section) -> Iterable:
            return progress(cells, section)

        wanted = [name for name in OF_SECTION[section] if name in have]
        _collect(section, arguments, wanted, save, watch)
        if not sections[section]["rows"]:
            return {}, f"this GPU has too little memory for {section}"
    return sections, ""


def _collect(section: str, arguments: argparse.Namespace, *rest: object) -> None:
    """rest: the peers, save and watch of the section's collect."""
    occupancy = arguments.occupancy or "device"
    if section == "forward":
        from flash_attn_sm120.bench import forward

        forward.collect(CELLS[arguments.cells or "standard"], occupancy, *rest)
    elif section == "prefill":
        from flash_attn_sm120.bench import prefill

        prefill.collect(prefill.PAGE_SIZE, occupancy, *rest)
    else:
        from flash_attn_sm120.bench import decode

        decode.collect(decode.cells_of("both"), occupancy, *rest)


def _show(section: str, found: dict) -> None:
    from flash_attn_sm120.bench import results, tables

    title, header, rows = tables.TABLES[section](found)
    print(f"\n{paint(f'{section}: {title}', 'bold')}\n{results.conditions(found)}\n")
    print(table(header, rows))
    if skipped := found.get("skipped"):
        print(paint(f"left out, too large for this GPU's memory: {'; '.join(skipped)}", "yellow"))


def _differences(found: dict) -> list[str]:
    return [
        f"{row['cell']}: {name} {reason}"
        for row in found["rows"]
        for name, reason in row.get("failed", {}).items()
        if reason.startswith("differs")
    ]
