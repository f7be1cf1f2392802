"""Dense prefill: both kernels of this package against every other attention that is installed, in one run.

    python benchmarks/forward.py [--cells issue|windows|head_dims] [--occupancy sm120|device] [--json FILE]
    python benchmarks/plot.py FILE PICTURE

TFLOPS count 2 * heads * (head_dim + head_dim_v) FLOP for each visible (query, key) pair. `ours` is what the dispatcher
picks, `other` this package's other kernel. --occupancy sm120 keeps no more of our blocks on an SM than SM120 holds;
flash-attn-4 runs both as it is and so. cuDNN may use instructions that SM120 lacks and is shown for reference only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from flash_attn_sm120 import launchers
from flash_attn_sm120.arguments import Arguments, Numbers, Queue
from flash_attn_sm120.bench import peers
from flash_attn_sm120.bench.ceiling import mma_tflops
from flash_attn_sm120.bench.collect import Save, Watch, collect_rows, conditions
from flash_attn_sm120.bench.sm120_mode import padded_smem
from flash_attn_sm120.bench.tables import forward_rows
from flash_attn_sm120.bench.timing import median_ms
from flash_attn_sm120.compile import build
from flash_attn_sm120.dispatch import TILES, Plan, can_implement, choose, plan_for
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.workspace import tickets

WRONG = 0.05  # a larger difference between two kernels is no rounding


@dataclass(frozen=True)
class Cell:
    batch: int
    seqlen: int
    heads: int = 16
    heads_kv: int = 16
    head_dim: int = 128
    head_dim_v: int = 128
    mask: str = "full"
    window: int | None = None

    @property
    def name(self) -> str:
        dims = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        window = "" if self.window is None else f" window {self.window}"
        return f"{dims} h{self.heads}/{self.heads_kv} {self.mask}{window} b{self.batch} s{self.seqlen}"

    @property
    def flop(self) -> float:
        pairs = self.seqlen**2 if self.mask == "full" else self.seqlen * (self.seqlen + 1) / 2
        if self.window is not None:
            outside = max(self.seqlen - self.window - 1, 0)
            pairs -= outside * (outside + 1) / 2
        return 2.0 * self.batch * self.heads * pairs * (self.head_dim + self.head_dim_v)

    @property
    def problem(self) -> AttentionProblem:
        mask = "local" if self.window is not None else self.mask
        return AttentionProblem("bfloat16", self.head_dim, self.head_dim_v, mask=mask)

    def inputs(self) -> tuple[torch.Tensor, ...]:
        shapes = [(self.heads, self.head_dim), (self.heads_kv, self.head_dim), (self.heads_kv, self.head_dim_v)]
        size = (self.batch, self.seqlen)
        return tuple(torch.randn(*size, *shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)


SIZES = ((4, 4096), (1, 16384))
MASKS = ("full", "causal")
ISSUE = [Cell(b, s, mask=mask) for mask in MASKS for b, s in SIZES]
ISSUE += [Cell(1, 16384, head_dim=64, head_dim_v=64, mask=mask) for mask in MASKS]
WINDOWS = [Cell(1, 16384, mask="causal", window=window) for window in (None, 1023, 127)]
DIMS = [
    Cell(b, s, 16, heads_kv, d, dv, mask)
    for d, dv in ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
    for heads_kv in (16, 4)
    for mask in MASKS
    for b, s in ((16, 1024), *SIZES)
]
CELLS = {"issue": ISSUE, "windows": WINDOWS, "head_dims": DIMS}


@cache
def launcher(problem: AttentionProblem, plan: Plan, target: str) -> Callable:
    return build(problem, plan, target)


def ours(cell: Cell, occupancy: str) -> dict[str, tuple[Plan, Callable]]:
    """{"ours": (plan, call(q, k, v) -> out)}, and "other" where this package's other kernel can do it too."""
    target = launchers.target(torch.cuda.current_device())
    picked = choose(cell.problem, target)
    plans = {"ours": picked}
    for name in TILES:
        if name != picked.kernel and can_implement(name, cell.problem, target):
            plans["other"] = plan_for(name, cell.problem)
    return {name: (plan, _call(cell, plan, occupancy, target)) for name, plan in plans.items()}


def _call(cell: Cell, plan: Plan, occupancy: str, target: str) -> Callable:
    if occupancy == "sm120":
        plan = replace(plan, smem_bytes=padded_smem(plan.smem_bytes, plan.blocks_per_sm))
    launch = launcher(cell.problem, plan, target)
    left = -1 if cell.window is None else cell.window
    numbers = Numbers(1 / math.sqrt(cell.head_dim), window_left=left)
    queue = queue_for(plan)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        launch(*Arguments(q, k, v, out, numbers=numbers), *queue)
        return out

    return call


def queue_for(plan: Plan) -> tuple:
    """What a launcher of the plan takes after Arguments."""
    if plan.kernel != "forward_tma":
        return ()
    device = torch.device("cuda", torch.cuda.current_device())
    return (Queue(tickets(1, device), launchers.sm_count(device)) if plan.persistent else None,)


def measure(cell: Cell, occupancy: str, wanted: list[str], ceiling: float) -> dict:
    """A row of the results: for each kernel ms, TFLOPS and the largest difference from ours, or why it has none."""
    sets = [cell.inputs() for _ in range(3)]
    own = ours(cell, occupancy)
    row: dict = {"cell": cell.name, **asdict(cell), "ms": {}, "tflops": {}, "difference": {}, "failed": {}}
    row["plans"] = {name: asdict(plan) for name, (plan, _) in own.items()}
    expected = own["ours"][1](*sets[0]).float()
    for name in [*own, *wanted]:
        try:
            if name not in own and cell.window is not None and name not in peers.TAKE_WINDOWS:
                raise peers.NotOffered("no windows")
            arguments = (cell.mask == "causal", cell.window, cell.heads != cell.heads_kv)
            call = own[name][1] if name in own else peers.peer(name, *arguments)
            difference = (call(*sets[0]).float() - expected).abs().max().item()
            if not difference <= WRONG:
                raise peers.Differs(f"{difference:.2g}")
            ms = median_ms(call, sets)
        except Exception as error:  # a peer that lacks a feature is a fact for the table
            if name in own and not isinstance(error, peers.Differs):
                raise
            row["failed"][name] = peers.reason(error)
            continue
        row["ms"][name], row["tflops"][name], row["difference"][name] = ms, cell.flop / ms / 1e9, difference
    best = max((row["tflops"].get(name, 0.0) for name in peers.MMA_SYNC), default=0.0)
    row["ratio"] = row["tflops"]["ours"] / best if best else None
    row["percent_of_ceiling"] = 100 * row["tflops"]["ours"] / ceiling
    return row


def show(rows: list[dict], wanted: list[str]) -> str:
    """The results as a Markdown table."""
    titles, lines = forward_rows(rows, wanted)
    head = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    return "\n".join(head + ["| " + " | ".join(cells) + " |" for cells in lines])


def collect(
    cells: str, occupancy: str, wanted: list[str], save: Save = lambda found: None, watch: Watch = iter
) -> dict:
    """The results of the cells of that name; save and watch as collect_rows has them."""
    ceiling = mma_tflops()
    found = conditions(occupancy) | {"cells": cells, "peers": wanted, "mma_tflops": ceiling}
    return collect_rows(found, CELLS[cells], lambda cell: measure(cell, occupancy, wanted, ceiling), save, watch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--occupancy", choices=("sm120", "device"), default="sm120", help="of our kernels")
    parser.add_argument("--cells", choices=CELLS, default="issue")
    parser.add_argument("--peers", default=",".join(peers.TITLES), help="comma list (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = [name for name in arguments.peers.split(",") if name]
    if unknown := set(wanted) - set(peers.TITLES):
        parser.error(f"--peers: expected some of {', '.join(peers.TITLES)}, got {', '.join(sorted(unknown))}")

    def save(found: dict) -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))

    found = collect(arguments.cells, arguments.occupancy, wanted, save)
    print(f"{found['device']}, torch {found['torch']}, bf16, TFLOPS, occupancy {arguments.occupancy}.")
    best = f"`best` is the fastest of {', '.join(peers.MMA_SYNC)}"
    print(f"mma.sync ceiling in this run: {found['mma_tflops']:.0f}. {best}.\n")
    print(show(found["rows"], wanted))


if __name__ == "__main__":
    main()
