"""What dropout, mods and lists of blocks cost: time over that of the same call without, in the same run.

    python benchmarks/changes.py [--occupancy sm120|device] [--every-plan] [--head-dim 128] [--only TEXT] [--json FILE]

bf16. Dense calls are b4 s4096; lists are of full blocks at b1 s16384, as many for each row of blocks, at
random, and their time is divided by density * dense time too. Both are timed in turn, as a GPU slows down as it gets
warm. --every-plan measures each tile of the table, --only the cases whose name has TEXT in it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from flash_attn_sm120 import mods, reference
from flash_attn_sm120.arguments import Arguments, Modifiers, Numbers
from flash_attn_sm120.bench.forward import Cell, launcher, ours, queue_for
from flash_attn_sm120.bench.sm120_mode import padded_smem
from flash_attn_sm120.bench.timing import in_turn_ms
from flash_attn_sm120.block_sparse import BlockSparseTensors
from flash_attn_sm120.changes import changes_of, kernel_fields, problem_fields
from flash_attn_sm120.checks import target_of
from flash_attn_sm120.compile import build_best
from flash_attn_sm120.dispatch import Plan, candidates

DENSE = [Cell(4, 4096, mask=mask) for mask in ("full", "causal")]
SPARSE = Cell(1, 16384)
DENSITIES = (1 / 8, 1 / 4, 1 / 2, 1)
BLOCK_SIZES = ((128, 128), (256, 128))
WRONG = 0.05


def random_blocks(cell: Cell, block_size: tuple[int, int], density: float) -> BlockSparseTensors:
    """As many blocks for each row of blocks."""
    rows, columns = (cell.seqlen // size for size in block_size)
    count = round(columns * density)
    order = torch.rand(cell.batch, cell.heads, rows, columns, device="cuda").argsort(-1)[..., :count]
    idx = order.sort(-1).values.int()
    return BlockSparseTensors(None, None, torch.full_like(idx[..., 0], count), idx, block_size)


def cases(cell: Cell) -> dict[str, dict]:
    """Options of flash_attn_func, by name."""
    slopes = torch.rand(cell.heads, device="cuda")
    documents = torch.arange(cell.seqlen, device="cuda", dtype=torch.int32).expand(cell.batch, -1) // 1000
    return {
        "dropout 0.1": {"dropout_p": 0.1, "dropout_seed": 7},
        "score_mod alibi": {"score_mod": mods.alibi(), "aux_tensors": [slopes]},
        "score_mod alibi, vec_size 2": {"score_mod": mods.alibi(vec_size=2), "aux_tensors": [slopes]},
        "score_mod softcap": {"score_mod": mods.softcap(30.0)},
        "mask_mod document": {"mask_mod": mods.document(), "aux_tensors": [documents]},
    }


def plans_of(cell: Cell, options: dict, every: bool) -> tuple[object, list[Plan]]:
    """(the problem, its plans, the dispatcher's first)."""
    names = ("dropout_p", "dropout_seed", "score_mod", "mask_mod", "aux_tensors", "aux_scalars", "block_sparse_tensors")
    changes = changes_of(torch.empty(0, device="cuda"), *(options.get(name) for name in names))
    problem = replace(cell.problem, **problem_fields(changes))
    plans = candidates(problem, "sm_120a")
    picked = build_best(problem, "sm_120a")[1]  # what SM120 gets, which another target's registers might not allow
    return (problem, changes), plans if every else [picked]


def call_of(cell: Cell, problem, changes, plan: Plan, occupancy: str) -> Callable:
    if occupancy == "sm120":
        plan = replace(plan, smem_bytes=padded_smem(plan.smem_bytes, plan.blocks_per_sm))
    launch = launcher(problem, plan, target_of(torch.cuda.get_device_capability()))
    fields = kernel_fields(changes, cell.batch, cell.heads, torch.device("cuda"))
    modifiers = Modifiers(None, None, None, None, *fields)
    numbers = Numbers(1 / math.sqrt(cell.head_dim))
    queue = queue_for(plan)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        launch(*Arguments(q, k, v, out, modifiers=modifiers, numbers=numbers), *queue)
        return out

    return call


def check(cell: Cell, options: dict, call: Callable, tensors: tuple[torch.Tensor, ...]) -> float:
    """Largest difference of the first head from the reference."""
    blocks = options.get("block_sparse_tensors")
    if blocks is not None:
        lists = (None, None, blocks.full_block_cnt[:, :1], blocks.full_block_idx[:, :1])
        options = {"block_sparse_tensors": BlockSparseTensors(*lists, blocks.block_size)}
    first = [tensor[:1, :, :1] for tensor in tensors]
    exact, _ = reference.attention(*first, causal=cell.mask == "causal", **options)
    difference = (call(*tensors)[:1, :, :1].float() - exact).abs().max().item()
    if not difference <= WRONG:
        raise RuntimeError(f"{cell.name}: differs by {difference:.2g}")
    return difference


def measure(cell: Cell, name: str, options: dict, work: float, arguments: argparse.Namespace) -> list[dict]:
    """Rows of the results. work: of the dense call's, the part that is left."""
    sets = [cell.inputs() for _ in range(3)]
    dense = ours(cell, arguments.occupancy)["ours"][1]
    (problem, changes), plans = plans_of(cell, options, arguments.every_plan)
    calls = [call_of(cell, problem, changes, plan, arguments.occupancy) for plan in plans[:2]]
    difference = [check(cell, options, call, sets[0]) for call in calls]
    timed = {i: (call, sets) for i, call in enumerate((dense, *calls))}
    base, *every = in_turn_ms(timed, arguments.turns, arguments.repeats).values()
    rows = []
    for plan, ms, far in zip(plans, every, difference, strict=False):
        tile = f"{plan.tile_m}x{plan.tile_n}"
        row = {"cell": cell.name, "case": name, "tile": tile, "difference": far, "dense_ms": base, "ms": ms}
        rows.append(row | {"ratio": ms / base / work, "tflops": cell.flop * work / ms / 1e9})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--occupancy", choices=("sm120", "device"), default="sm120")
    parser.add_argument("--every-plan", action="store_true")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--only", default="")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5, help="of each turn")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, occupancy {arguments.occupancy}\n")
    print("| cell | case | tile | dense, ms | ms | ms / (density * dense ms) | TFLOPS |\n" + "| --- " * 7 + "|")
    dims = {"head_dim": arguments.head_dim, "head_dim_v": arguments.head_dim}
    dense, sparse = [replace(cell, **dims) for cell in DENSE], replace(SPARSE, **dims)
    jobs = [(cell, name, options, 1.0) for cell in dense for name, options in cases(cell).items()]
    for block_size in BLOCK_SIZES:
        for density in DENSITIES:
            options = {"block_sparse_tensors": random_blocks(sparse, block_size, density)}
            jobs.append((sparse, f"blocks {block_size[0]}x{block_size[1]}, 1/{1 / density:.0f}", options, density))
    rows = []
    for job in (job for job in jobs if arguments.only in job[1]):
        for row in measure(*job, arguments):
            rows.append(row)
            numbers = f"{row['dense_ms']:.3f} | {row['ms']:.3f} | {row['ratio']:.3f} | {row['tflops']:.0f}"
            print(f"| {row['cell']} | {row['case']} | {row['tile']} | {numbers} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"occupancy": arguments.occupancy, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
