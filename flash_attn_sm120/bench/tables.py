"""Results as tables: (what it shows, titles, cells of each row). Needs neither torch nor a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Table = tuple[str, list[str], list[list[str]]]

DENSE = {
    "sdpa_flash": "SDPA flash",
    "flash_attn_4": "flash-attn-4",
    "flash_attn_4_sm120": "flash-attn-4, SM120 mode",
    "sdpa_cudnn": "SDPA cuDNN",
}
PREFILL = {
    "dense": "dense",
    "bf16": "paged",
    "e4m3": "e4m3, paged",
    "flashinfer bf16": "FlashInfer, paged",
    "flashinfer e4m3": "FlashInfer, e4m3, paged",
}
DECODE = {
    "sdpa_flash": "SDPA flash, dense KV",
    "sdpa_cudnn": "SDPA cuDNN, dense KV",
    "flash_attn_4": "flash-attn-4, dense KV",
    "flashinfer": "FlashInfer",
}


def forward(found: dict) -> Table:
    """Results of forward.collect."""
    title = f"dense prefill, bf16, TFLOPS; mma.sync ceiling of this run: {found['mma_tflops']:.0f}"
    return title, *forward_rows(found["rows"], found["peers"])


def forward_rows(rows: Sequence[dict], wanted: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(titles, cells of each row) with columns for the wanted peers."""
    titles = ["cell", "ms", "ours", "other", *(DENSE[name] for name in wanted), "ours / best", "% of ceiling"]
    lines = []
    for row in rows:
        speeds = [_speed(row, name) for name in ("ours", "other", *wanted)]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append([row["cell"], f"{row['ms']['ours']:.3f}", *speeds, ratio, f"{row['percent_of_ceiling']:.0f}"])
    return titles, lines


def prefill(found: dict) -> Table:
    """Results of prefill.collect."""
    known = [name for name in PREFILL if any(_speed(row, name) for row in found["rows"])]
    lines = []
    for row in found["rows"]:
        speed = row["tflops"]
        ratios = [f"{speed['bf16'] / speed['dense']:.2f}", f"{speed['e4m3'] / speed['bf16']:.2f}"]
        alone = row.get("alone", {})
        ratios.append(f"{alone['e4m3'] / alone['bf16']:.2f}" if alone else "")
        lines.append([row["cell"], *(_speed(row, name) for name in known), *ratios])
    title = f"from pages of {found['rows'][0]['page_size']} tokens, TFLOPS, calls in turn"
    ratios = ["paged / dense", "e4m3 / bf16", "each alone"]
    return title, ["cell", *(PREFILL[name] for name in known), *ratios], lines


def decode(found: dict) -> Table:
    """Results of decode.collect: microseconds of graph replays, ours and the peers'."""
    wanted = [name for name in DECODE if name in found.get("peers", ())]
    titles = ["cell", "splits", "eager us", "graph us", "TB/s", "% of a plain read"]
    titles += [f"{DECODE[name]}, us" for name in wanted]
    lines = []
    for row in found["rows"]:
        share = 100 * row["graph_tb_s"] / found["read_tb_s"]
        cells = [row["cell"], str(row["splits"]), f"{row['eager_us']:.1f}", f"{row['graph_us']:.1f}"]
        cells += [f"{row['graph_tb_s']:.2f}", f"{share:.0f}"]
        for name in wanted:
            peer = row["peers"].get(name)
            cells.append(f"{peer['graph_us']:.1f}" if peer else _short(row["failed"].get(name, "")))
        lines.append(cells)
    return f"one query token, graph replays; a plain read in this run: {found['read_tb_s']:.2f} TB/s", titles, lines


def _speed(row: dict, name: str) -> str:
    """TFLOPS, or why there are none."""
    return f"{row['tflops'][name]:.0f}" if name in row["tflops"] else _short(row.get("failed", {}).get(name, ""))


def _short(reason: str) -> str:
    return reason.partition(":")[0]


TABLES: dict[str, Callable[[dict], Table]] = {"forward": forward, "prefill": prefill, "decode": decode}
