"""A picture of what forward.py measured: a line for each cell, a mark for each kernel.

python benchmarks/plot.py results.json out.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MARKS = {
    "ours": ("ours", "o", "tab:green"),
    "other": ("ours, other kernel", "o", "tab:olive"),
    "sdpa_flash": ("SDPA flash", "s", "tab:blue"),
    "flash_attn_4": ("flash-attn-4", "^", "tab:red"),
    "flash_attn_4_sm120": ("flash-attn-4, SM120 mode", "v", "tab:orange"),
    "sdpa_cudnn": ("SDPA cuDNN", "x", "tab:gray"),
}


def draw(results: dict, path: Path) -> None:
    """results: as forward.py writes them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    figure, axes = pyplot.subplots(figsize=(9, 1.8 + 0.24 * len(rows)), layout="constrained")
    for name, (title, mark, colour) in MARKS.items():
        points = [(row["tflops"][name], place) for place, row in enumerate(rows) if name in row["tflops"]]
        if points:
            axes.plot(*zip(*points, strict=True), mark, color=colour, label=title, alpha=0.8)
    axes.axvline(results["mma_tflops"], color="black", linewidth=1, label="mma.sync ceiling")
    axes.set_yticks(range(len(rows)), [row["cell"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.set_xlabel("TFLOPS")
    axes.set_title(f"{results['device']}, bf16, our occupancy: {results['occupancy']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/plot.py results.json out.png")
    try:
        draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        sys.exit("plot.py needs matplotlib: pip install 'flash-attn-sm120[bench]'")


if __name__ == "__main__":
    main()
