"""Pictures of results: bars of TFLOPS or TB/s for each kernel, beside the ceiling of the same run.

    python benchmarks/plot.py results.json out.png

results.json is what forward.py, prefill.py, decode.py or `flash-attn-sm120 bench --json` wrote. Several sections in it
make several pictures: out-forward.png, out-prefill.png and so on.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_attn_sm120.bench import results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GET_MATPLOTLIB = 'pictures need matplotlib: pip install "flash-attn-sm120[bench]"'
# Okabe and Ito's palette, which colour-blind people can tell apart; ours is the one strong colour.
STYLES = {
    "ours": ("this package", "#009E73"),
    "other": ("this package, its other kernel", "#8FD3BF"),
    "sdpa_flash": ("PyTorch SDPA, flash", "#0072B2"),
    "flash_attn_4": ("flash-attn-4", "#D55E00"),
    "flash_attn_4_sm120": ("flash-attn-4, SM120 mode", "#E69F00"),
    "sdpa_cudnn": ("PyTorch SDPA, cuDNN", "#999999"),
    "flashinfer": ("FlashInfer", "#CC79A7"),
    "dense": ("this package, dense", "#005C45"),
    "bf16": ("this package, paged bf16", "#009E73"),
    "e4m3": ("this package, paged e4m3", "#8FD3BF"),
    "flashinfer bf16": ("FlashInfer, paged bf16", "#CC79A7"),
    "flashinfer e4m3": ("FlashInfer, paged e4m3", "#E8BFD6"),
}
DENSE_ROWS = ("sdpa_flash", "sdpa_cudnn", "flash_attn_4")  # of decode: these read no pages
BAR = 0.8  # of the room of a group
WIDTH, WIDEST = 11.0, 16.0  # inches
PANEL, HEAD = 2.6, 0.75  # inches of a row of panels, of the titles over them
ROOM = 0.28  # inches that the number of a bar takes
LINE = 0.2  # inches of a line of the legend or of a note
KEY = "b: sequences, s: tokens of each"


@dataclass(frozen=True)
class Panel:
    """Groups of bars: one a cell, in each one bar a kernel that has a number there."""

    title: str
    labels: list[str]
    values: dict[str, list[float | None]]  # by the name of the kernel, one a cell

    @property
    def drawn(self) -> list[str]:
        """The kernels that have a number here."""
        return [name for name, values in self.values.items() if any(value is not None for value in values)]


def draw(section: str, found: dict, path: Path) -> None:
    """Writes the picture of one section's results, as forward.py, prefill.py or decode.py collect them."""
    import matplotlib

    matplotlib.use("Agg")
    DRAWINGS[section](found).savefig(path, dpi=160)


def draw_all(sections: dict[str, dict], path: Path) -> list[Path]:
    """Writes a picture a section and returns their files: path itself, or path-section where there are several."""
    files = []
    for section, found in sections.items():
        name = path.name if len(sections) == 1 else f"{path.stem}-{section}{path.suffix}"
        files.append(path.with_name(name))
        draw(section, found, files[-1])
    return files


def forward(found: dict) -> Figure:
    """One panel a head dim, head count and mask."""
    panels = _tflops_panels(found["rows"])
    ceiling = (found["mma_tflops"], f"mma.sync ceiling of this run: {found['mma_tflops']:.0f}")
    notes = [f"bfloat16; median of CUDA events; higher is better. {KEY}."]
    if any("sdpa_cudnn" in panel.values for panel in panels):
        notes.append("cuDNN may use instructions that SM120 lacks.")
    return _figure("Attention forward, TFLOPS", "TFLOPS", panels, ceiling, found, notes)


def prefill(found: dict) -> Figure:
    """One panel a mask."""
    page_size = found["rows"][0]["page_size"]
    notes = [
        f"Pages of {page_size} tokens in random order; bfloat16 q; median of CUDA events, calls in turn; "
        f"higher is better. {KEY}."
    ]
    title = "Prefill from a paged KV cache, TFLOPS"
    return _figure(title, "TFLOPS", _tflops_panels(found["rows"]), None, found, notes)


def decode(found: dict) -> Figure:
    """One panel a KV dtype, and one of short and windowed contexts."""
    grouped: dict[str, list[dict]] = {}
    for row in found["rows"]:
        short = "window" in row["cell"] or "s1024 " in row["cell"]
        kind = "e4m3" if "e4m3" in row["cell"] else "bfloat16"
        grouped.setdefault(f"{kind} K and V, few keys to read" if short else f"{kind} K and V", []).append(row)
    have = {name for row in found["rows"] for name in row.get("peers", {})}
    peers = [name for name in STYLES if name in have]
    panels = []
    for title, rows in grouped.items():
        values: dict[str, list[float | None]] = {"ours": [row["graph_tb_s"] for row in rows]}
        for name in peers:
            values[name] = [row.get("peers", {}).get(name, {}).get("graph_tb_s") for row in rows]
        panels.append(Panel(title, [_context(row["cell"]) for row in rows], values))
    ceiling = (found["read_tb_s"], f"plain read of this run: {found['read_tb_s']:.2f} TB/s")
    notes = [
        "One query token a sequence, pages in random order; CUDA graph replay; TB/s of K and V read; higher is better."
    ]
    notes.append(f"{KEY}, h: heads of q / of K and V.")
    if dense := [STYLES[name][0] for name in peers if name in DENSE_ROWS]:
        notes.append(f"Without pages, from dense K and V: {'; '.join(dense)}.")
    return _figure("Decode from a paged KV cache, TB/s", "TB/s", panels, ceiling, found, notes)


DRAWINGS: dict[str, Callable[[dict], Figure]] = {"forward": forward, "prefill": prefill, "decode": decode}


def _tflops_panels(rows: Sequence[dict]) -> list[Panel]:
    """One panel for all cells that differ in size only."""
    grouped: dict[str, list[dict]] = {}
    for row in rows:
        grouped.setdefault(_shape(row["cell"]), []).append(row)
    names = [name for name in STYLES if any(name in row["tflops"] for row in rows)]
    return [
        Panel(title, [_size(row["cell"]) for row in same], {n: [row["tflops"].get(n) for row in same] for n in names})
        for title, same in grouped.items()
    ]


def _shape(cell: str) -> str:
    """`d128 h32/8 causal b4 s4096` -> `head_dim 128, 32 heads, 8 of KV, causal`."""
    match = re.match(r"d(\S+) h(\d+)/(\d+) (\w+)", cell)
    if match is None:
        return ""
    head_dim, heads, heads_kv, mask = match.groups()
    return f"head_dim {head_dim}, {heads} heads, " + (f"{heads_kv} of KV, " if heads_kv != heads else "") + mask


def _size(cell: str) -> str:
    """`d128 h16/16 causal window 127 b1 s16384` -> `b1 s16384` over `window 127`."""
    match = re.search(r"(window \d+ )?(b\d+ s\d+)$", cell)
    if match is None:
        return cell
    return match[2] + (f"\n{match[1].strip()}" if match[1] else "")


def _context(cell: str) -> str:
    """`b1 s8192 h32/8 bf16 window 1023` -> `b1 s8192` over `h32/8` over `window 1023`."""
    return re.sub(r" (bf16|e4m3)", "", cell).replace(" h", "\nh").replace(" window", "\nwindow")


def _figure(
    title: str, unit: str, panels: Sequence[Panel], ceiling: tuple[float, str] | None, found: dict, notes: Sequence[str]
) -> Figure:
    """Panels side by side, as many as their bars leave room for, over one scale; legend and notes underneath."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    widest = max(len(panel.labels) for panel in panels)
    columns = min(len(panels), max(1, 12 // widest), 4)
    rows = -(-len(panels) // columns)
    shown = [name for name in STYLES if any(name in panel.drawn for panel in panels)]
    legend: list[Any] = [Patch(color=STYLES[name][1], label=STYLES[name][0]) for name in shown]
    if ceiling:
        legend.append(Line2D([], [], color="black", linewidth=1, linestyle="--", label=ceiling[1]))
    foot = LINE * (-(-len(legend) // 4) + len(notes) + 1)
    height = HEAD + PANEL * rows + foot
    bars = columns * widest * max(len(panel.drawn) for panel in panels)
    width = min(max(WIDTH, bars * ROOM), WIDEST)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width, height), sharey=True, squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(rect=(0, foot / height, 1, 1 - (HEAD + foot) / height))
    flat: list[Axes] = list(axes.flat)
    for axis, panel in zip(flat, panels, strict=False):
        _panel(axis, panel, ceiling, widest, numbers=bars * ROOM <= width)
    for axis in flat[len(panels) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel(unit)
    figure.text(0.5, 1 - 0.28 / height, title, ha="center", va="center", fontsize=15, fontweight="bold")
    figure.text(0.5, 1 - 0.56 / height, results.conditions(found), ha="center", va="center", fontsize=10)
    anchor = (0.5, (LINE * (len(notes) + 0.5)) / height)
    figure.legend(handles=legend, loc="lower center", bbox_to_anchor=anchor, ncols=4, fontsize=9, frameon=False)
    figure.text(0.5, LINE * 0.3 / height, "\n".join(notes), ha="center", va="bottom", fontsize=8, color="#444444")
    return figure


def _panel(axis: Axes, panel: Panel, ceiling: tuple[float, str] | None, widest: int, numbers: bool) -> None:
    """widest: groups of the panel that has most. numbers: whether each bar says its value."""
    width = BAR / len(panel.drawn)
    for index, name in enumerate(panel.drawn):
        shift = (index - (len(panel.drawn) - 1) / 2) * width
        points = [(place + shift, value) for place, value in enumerate(panel.values[name]) if value is not None]
        places, heights = zip(*points, strict=True)
        bars = axis.bar(places, heights, width, color=STYLES[name][1], zorder=2)
        if numbers:
            texts = [f"{height:.0f}" if height >= 10 else f"{height:.1f}" for height in heights]
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.0}  # over the ceiling's line
            axis.bar_label(bars, texts, fontsize=7, padding=2, bbox=paper)
    if ceiling:
        axis.axhline(ceiling[0], color="black", linewidth=1, linestyle="--", zorder=1)
    axis.set_xticks(range(len(panel.labels)), panel.labels, fontsize=8)
    axis.set_title(panel.title, fontsize=10)
    middle = (len(panel.labels) - 1) / 2
    axis.set_xlim(middle - widest / 2, middle + widest / 2)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args(argv)
    try:
        draw_all(results.load(arguments.results), arguments.picture)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        sys.exit(GET_MATPLOTLIB)


if __name__ == "__main__":
    main()
