"""Decode from a paged KV cache: microseconds, TB/s of K and V read, and the share of what a plain read reaches here.

    python benchmarks/decode.py [--occupancy sm120] [--kv bf16|e4m3|both] [--json FILE]

--occupancy sm120 pads the dynamic shared memory of the launches so that no more blocks are resident on an SM than SM120
could hold. Times are medians over fresh inputs in turn, more of them than L2 holds. eager: launched by the host each
time; graph: a graph of one call, replayed, with the 3 to 5 us that launching any graph takes; row: a call's share of a
graph of all calls one behind the other, as a model's layers are replayed, of which TB/s are.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flash_attn_sm120 import launchers
from flash_attn_sm120.arguments import Arguments, Lengths, Numbers, Partials
from flash_attn_sm120.bench import paged_peers, peers
from flash_attn_sm120.bench.collect import Save, Watch, collect_rows, conditions
from flash_attn_sm120.bench.sm120_mode import padded_smem
from flash_attn_sm120.bench.timing import median_ms
from flash_attn_sm120.compile import build
from flash_attn_sm120.dispatch import Plan, choose
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.splits import Splits, choose_splits

L2_BYTES = 64 << 20
MOST_SETS = 64
WRONG = 0.1  # of the largest value: a larger difference between two kernels is no rounding
KV_DTYPES = {"": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Cell:
    batch: int
    seqlen: int
    heads: int = 32
    heads_kv: int = 8
    kv_dtype: str = ""
    window: int | None = None
    head_dim: int = 128
    page_size: int = 16
    seqlen_q: int = 1

    @property
    def name(self) -> str:
        window = "" if self.window is None else f" window {self.window}"
        kind = {"": "bf16", "float8_e4m3fn": "e4m3"}[self.kv_dtype]
        return f"b{self.batch} s{self.seqlen} h{self.heads}/{self.heads_kv} {kind}{window}"

    @property
    def bytes_read(self) -> int:
        keys = self.seqlen if self.window is None else min(self.seqlen, self.window + 1)
        return 2 * self.batch * keys * self.heads_kv * self.head_dim * (1 if self.kv_dtype else 2)

    def problem(self, split: bool) -> AttentionProblem:
        mask = "causal" if self.window is None else "local"
        return AttentionProblem(
            "bfloat16", self.head_dim, self.head_dim, mask=mask, seqused_k=True, kv_dtype=self.kv_dtype,
            page_size=self.page_size, decode=True, split=split,
        )  # fmt: skip


ISSUE = [
    (1, 8192, 32, 8),
    (1, 65536, 32, 8),
    (8, 8192, 32, 8),
    (64, 4096, 32, 8),
    (64, 4096, 64, 8),
    (16, 8192, 32, 32),
]
WINDOWS = [Cell(batch, 1024) for batch in (1, 64)] + [Cell(batch, 32768, window=1023) for batch in (1, 64)]


def cells_of(kv: str) -> list[Cell]:
    """kv: bf16, e4m3 or both."""
    kinds = {"bf16": [""], "e4m3": ["float8_e4m3fn"], "both": list(KV_DTYPES)}[kv]
    return [Cell(*sizes, kv_dtype=kind) for kind in kinds for sizes in ISSUE] + WINDOWS


def inputs(cell: Cell, splits: Splits, sets: int) -> list[tuple]:
    """Arguments of calls that are like a model's layers: one page table, in random order, and pools of their own."""
    pages = -(-cell.seqlen // cell.page_size)
    table = torch.randperm(cell.batch * pages, device="cuda").int().reshape(cell.batch, pages)
    used = torch.full((cell.batch,), cell.seqlen, device="cuda", dtype=torch.int32)
    window = (0, 0) if cell.window is None else (cell.window, 0)
    numbers = Numbers(1 / math.sqrt(cell.head_dim), 0.0, *window)
    shape = (cell.batch * pages, cell.page_size, cell.heads_kv, cell.head_dim)
    lengths, dtype = Lengths(seqused_k=used, page_table=table), KV_DTYPES[cell.kv_dtype]
    q_shape = (cell.batch, cell.seqlen_q, cell.heads, cell.head_dim)
    partials = None
    if splits.num_splits > 1:
        partials = Partials(
            torch.empty(splits.num_splits, *q_shape, device="cuda"),
            torch.empty(splits.num_splits, cell.batch, cell.heads, cell.seqlen_q, device="cuda"),
            torch.zeros(splits.tickets, device="cuda", dtype=torch.int32),
            splits.slots,
        )
    calls = []
    for _ in range(sets):
        q = torch.randn(q_shape, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2))
        calls.append((*Arguments(q, k, v, torch.empty_like(q), None, lengths, numbers=numbers), partials))
    return calls


def set_count(bytes_read: int) -> int:
    """Of input sets that calls take in turn. A set may keep its place in L2 through several turns of others, so that
    what L2 holds has to be a small part of all of them."""
    return min(max(2, -(-24 * L2_BYTES // bytes_read)), MOST_SETS)


def graph_ms(call: Callable, sets: list[tuple], repeats: int = 20) -> float:
    """Median milliseconds of one replay of a graph that holds one call."""
    graphs = []
    for arguments in sets:
        call(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(*arguments)
        graphs.append((graph,))
    return median_ms(lambda graph: graph.replay(), graphs, repeats)


def row_ms(call: Callable, sets: list[tuple], repeats: int = 20) -> float:
    """Milliseconds a call, of all input sets one behind the other in one graph."""
    graph = torch.cuda.CUDAGraph()
    for arguments in sets:
        call(*arguments)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for arguments in sets:
            call(*arguments)
    return median_ms(lambda: graph.replay(), [()], repeats) / len(sets)


def read_tb_s() -> float:
    """What a plain reduction reads, 4 GB at a time, or a quarter of the GPU's memory where that is less."""
    words = min(1 << 30, torch.cuda.get_device_properties(0).total_memory // 16)
    x = torch.ones(words, device="cuda", dtype=torch.float32)
    return x.numel() * 4 / median_ms(lambda: x.sum(), [()]) / 1e9


def prepare(cell: Cell, occupancy: str, plan: Plan | None = None, num_splits: int = 0) -> tuple[Callable, Splits]:
    device = torch.device("cuda", torch.cuda.current_device())
    target, sms = launchers.target(device.index), launchers.sm_count(device)
    q_shape = (cell.batch, cell.seqlen_q, cell.heads, cell.head_dim)
    sizes = (q_shape, cell.heads_kv, cell.batch, cell.seqlen_q, cell.seqlen)
    splits = choose_splits(cell.problem(True), sms, *sizes, num_splits)
    problem = cell.problem(splits.num_splits > 1)
    plan = plan or choose(problem, target)
    if occupancy == "sm120":
        plan = replace(plan, smem_bytes=padded_smem(plan.smem_bytes, plan.blocks_per_sm))
    return build(problem, plan, target), splits


def measure(
    cell: Cell, occupancy: str, plan: Plan | None = None, num_splits: int = 0, wanted: Sequence[str] = ()
) -> dict:
    """A row of the results: microseconds and TB/s, and under "peers" and "failed" those of the wanted peers."""
    call, splits = prepare(cell, occupancy, plan, num_splits)
    sets = inputs(cell, splits, set_count(cell.bytes_read))
    row = {"cell": cell.name, "splits": splits.num_splits}
    timings = {"eager": median_ms(call, sets), "graph": graph_ms(call, sets), "row": row_ms(call, sets)}
    for name, ms in timings.items():
        row[f"{name}_us"] = ms * 1e3
        row[f"{name}_tb_s"] = cell.bytes_read / ms / 1e9
    if wanted:
        row |= {"peers": {}, "failed": {}}
    for name in wanted:
        try:
            row["peers"][name] = _peer(name, cell, call, sets)
        except Exception as error:  # a peer that lacks a feature is a fact for the table
            row["failed"][name] = peers.reason(error)
    return row


def _peer(name: str, cell: Cell, ours: Callable, sets: list[tuple]) -> dict:
    """Graphs of the fastest of a peer's ways. sets: of our call. Raises where it has none or is wrong."""
    if reason := paged_peers.unable(name, cell.window, cell.kv_dtype):
        raise peers.NotOffered(reason)
    arguments = [Arguments(*own[:-1]) for own in sets]
    same = [(own.q, own.k, own.v, own.lengths.page_table) for own in arguments]
    calls, own_sets = paged_peers.decode_calls(name, same, cell.seqlen, cell.window)
    ours(*sets[0])
    expected = arguments[0].out.float()
    failures: list[Exception] = []
    times, difference = [], 0.0
    for call in calls:
        try:
            off = (call(*own_sets[0]).float() - expected).abs().max().item()
            if not off <= WRONG * expected.abs().max().item():
                raise peers.Differs(f"{off:.2g}")
            times.append((graph_ms(call, own_sets), row_ms(call, own_sets)))
            difference = max(difference, off)
        except Exception as error:  # one of several ways may lack what another has
            failures.append(error)
    wrong = [error for error in failures if isinstance(error, peers.Differs)]
    if wrong or not times:
        raise (wrong or failures)[0]
    found: dict[str, float] = {"difference": difference}
    for kind, ms in zip(("graph", "row"), map(min, zip(*times, strict=True)), strict=True):
        found |= {f"{kind}_us": ms * 1e3, f"{kind}_tb_s": cell.bytes_read / ms / 1e9}
    return found


def collect(
    cells: list[Cell],
    occupancy: str,
    wanted: Sequence[str] = (),
    save: Save = lambda found: None,
    watch: Watch = iter,
) -> dict:
    """The results of these cells; save and watch as collect_rows has them."""
    found = conditions(occupancy) | {"peers": list(wanted), "read_tb_s": read_tb_s()}
    return collect_rows(found, cells, lambda cell: measure(cell, occupancy, wanted=wanted), save, watch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--occupancy", choices=("sm120", "device"), default="sm120")
    parser.add_argument("--kv", choices=("bf16", "e4m3", "both"), default="both")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cells = cells_of(arguments.kv)
    found = conditions(arguments.occupancy)
    found["read_tb_s"] = ceiling = read_tb_s()
    print(f"{found['device']}, torch {found['torch']}, occupancy {arguments.occupancy}")
    print(f"a plain read: {ceiling:.2f} TB/s\n")
    print("| cell | splits | eager us | graph us | row us | TB/s | of a plain read |\n" + "| --- " * 7 + "|")
    rows = []
    for cell in cells:
        row = measure(cell, arguments.occupancy)
        rows.append(row)
        best = row["row_tb_s"]
        times = f"{row['eager_us']:.1f} | {row['graph_us']:.1f} | {row['row_us']:.1f}"
        print(f"| {row['cell']} | {row['splits']} | {times} | {best:.2f} | {best / ceiling:.0%} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
