"""Prefill from a paged KV cache, of 16 and of 8 bits, against this package's own dense kernels in the same run.

    python benchmarks/prefill.py [--occupancy sm120|device] [--json FILE]

TFLOPS as benchmarks/forward.py counts them. Pages lie in random order. In turn: the calls one after the other, at the
clock that all of them together leave; alone: each once it has run by itself for half a second. FlashInfer's numbers are
those of benchmarks/NOTES.md where it isn't installed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flash_attn_sm120 import launchers
from flash_attn_sm120.arguments import Arguments, Lengths, Numbers
from flash_attn_sm120.bench import paged_peers, peers
from flash_attn_sm120.bench.collect import Save, Watch, collect_rows, conditions
from flash_attn_sm120.bench.forward import MASKS, SIZES, WRONG, Cell, launcher, ours
from flash_attn_sm120.bench.sm120_mode import padded_smem
from flash_attn_sm120.bench.timing import alone_ms, in_turn_ms
from flash_attn_sm120.dispatch import choose
from flash_attn_sm120.problem import AttentionProblem

KV_DTYPES = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
PAGE_SIZE = 16
CELLS = [Cell(b, s, heads=32, heads_kv=8, mask=mask) for mask in MASKS for b, s in SIZES]


def pool(rows: torch.Tensor, table: torch.Tensor, page_size: int, dtype: torch.dtype) -> torch.Tensor:
    """(batch, seqlen, heads_kv, d) -> (num_pages, page_size, heads_kv, d), pages where the table says."""
    pages = rows.reshape(-1, page_size, *rows.shape[2:])
    found = torch.empty(pages.shape, dtype=dtype, device=rows.device)
    found.view(torch.int8)[table.flatten().long()] = pages.to(dtype).view(torch.int8)
    return found


def paged(cell: Cell, page_size: int, kind: str, occupancy: str) -> tuple[Callable, Callable, torch.Tensor]:
    """(what makes the arguments of a call of dense q, k and v, the call, its page table)."""
    kv_dtype = "" if kind == "bf16" else "float8_e4m3fn"
    way = {"seqused_k": True, "page_size": page_size, "kv_dtype": kv_dtype}
    problem = AttentionProblem("bfloat16", cell.head_dim, cell.head_dim_v, mask=cell.mask, **way)
    target = launchers.target(torch.cuda.current_device())
    plan = choose(problem, target)
    if occupancy == "sm120":
        plan = replace(plan, smem_bytes=padded_smem(plan.smem_bytes, plan.blocks_per_sm))
    launch = launcher(problem, plan, target)
    used = torch.full((cell.batch,), cell.seqlen, device="cuda", dtype=torch.int32)
    table = torch.randperm(cell.batch * cell.seqlen // page_size, device="cuda").int().view(cell.batch, -1)
    lengths = Lengths(seqused_k=used, page_table=table)
    numbers = Numbers(1 / math.sqrt(cell.head_dim))

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (q, *(pool(rows, table, page_size, KV_DTYPES[kind]) for rows in (k, v)))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        launch(*Arguments(q, k, v, out, lengths=lengths, numbers=numbers))
        return out

    return prepare, call, table


def measure(cell: Cell, page_size: int, occupancy: str, wanted: Sequence[str] = ()) -> dict:
    """TFLOPS of each, all in turn and each alone, and the largest difference from the dense kernel on what the pages
    hold; a wanted peer's are under its name and kind."""
    sets = [cell.inputs() for _ in range(3)]
    dense = ours(cell, occupancy)["ours"][1]
    row = {"cell": cell.name, "page_size": page_size, "difference": {}}
    timed = {"dense": (dense, sets)}
    for kind, dtype in KV_DTYPES.items():
        prepare, call, table = paged(cell, page_size, kind, occupancy)
        own = [prepare(*tensors) for tensors in sets]
        q, k, v = sets[0]
        expected = dense(q, k.to(dtype).to(k.dtype), v.to(dtype).to(v.dtype)).float()
        result = call(*own[0]).float()
        difference = (result - expected).abs().max().item()
        if not difference <= WRONG:
            raise RuntimeError(f"{cell.name}, pages of {page_size}, {kind}: differs by {difference:.2g}")
        row["difference"][kind], timed[kind] = difference, (call, own)
        if "flashinfer" in wanted:
            try:
                timed[f"flashinfer {kind}"] = (_flashinfer(cell, table, own, result), own)
            except Exception as error:  # a peer that lacks a feature is a fact for the table
                row.setdefault("failed", {})[f"flashinfer {kind}"] = peers.reason(error)
    for way, measured in (("tflops", in_turn_ms(timed)), ("alone", alone_ms(timed))):
        row[way] = {name: cell.flop / ms / 1e9 for name, ms in measured.items()}
    return row


def _flashinfer(cell: Cell, table: torch.Tensor, sets: list[tuple], expected: torch.Tensor) -> Callable:
    """FlashInfer on the same pages. Raises where it isn't there or is wrong."""
    q, k_pool, _ = sets[0]
    call = paged_peers.flashinfer_prefill(q.shape, k_pool, table, cell.mask == "causal")
    difference = (call(*sets[0]).float() - expected).abs().max().item()
    if not difference <= WRONG:
        raise peers.Differs(f"{difference:.2g}")
    return call


def collect(
    page_size: int, occupancy: str, wanted: Sequence[str] = (), save: Save = lambda found: None, watch: Watch = iter
) -> dict:
    """The results of all cells; save and watch as collect_rows has them."""
    found = conditions(occupancy) | {"peers": list(wanted)}
    return collect_rows(found, CELLS, lambda cell: measure(cell, page_size, occupancy, wanted), save, watch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--occupancy", choices=("sm120", "device"), default="sm120")
    parser.add_argument("--page-size", type=int, default=PAGE_SIZE)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = conditions(arguments.occupancy)
    print(f"{found['device']}, torch {found['torch']}, occupancy {arguments.occupancy}, TFLOPS\n")
    titles = [f"{name}, {way}" for way in ("in turn", "alone") for name in ("dense", "paged", "e4m3, paged")]
    titles = ["cell", *titles, "paged / dense", "e4m3 / bf16, in turn", "e4m3 / bf16, alone"]
    print(f"| {' | '.join(titles)} |\n{'| --- ' * len(titles)}|")
    rows = []
    for cell in CELLS:
        rows.append(measure(cell, arguments.page_size, arguments.occupancy))
        ways = [rows[-1]["tflops"], rows[-1]["alone"]]
        numbers = [f"{speed[name]:.0f}" for speed in ways for name in ("dense", "bf16", "e4m3")]
        numbers.append(f"{ways[0]['bf16'] / ways[0]['dense']:.2f}")
        numbers += [f"{speed['e4m3'] / speed['bf16']:.3f}" for speed in ways]
        print(f"| {cell.name} | {' | '.join(numbers)} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
