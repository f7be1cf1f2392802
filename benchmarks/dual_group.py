"""Two query groups in one launch against a launch for each, this package's plain kernel, in the same run.

    python benchmarks/dual_group.py [--occupancy sm120|device] [--json FILE] [--markdown FILE]
    python benchmarks/dual_group.py --once fused|two --shape "zigzag 16384" --rank 1    # one call, for ncu

Zigzag: rank r of 4 has chunks r and 7 - r of 8 of a causal sequence. Few rows: chunks of a rank of a server, of which
the first sees half of the keys and the second all. bf16, 32 heads, 8 KV heads, head_dim 128. KV read: keys that thread
blocks bring into shared memory, as the grids and ranges say (ncu counts the bytes that come from L2 and DRAM).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flash_attn_sm120.arguments import Arguments, DualGroupArguments, GroupLengths, Lengths, Numbers
from flash_attn_sm120.bench.forward import WRONG, launcher
from flash_attn_sm120.bench.sm120_mode import padded_smem
from flash_attn_sm120.bench.timing import median_ms
from flash_attn_sm120.checks import target_of
from flash_attn_sm120.dispatch import Plan, choose
from flash_attn_sm120.problem import AttentionProblem

WORLD = 4
HEADS, HEADS_KV, HEAD_DIM = 32, 8, 128


@dataclass(frozen=True)
class Shape:
    """chunk: rows of each group, a sequence. limits: max_kv_len of both."""

    name: str
    rank: int
    batch: int
    keys: int
    chunk: int
    limits: tuple[int, int]

    @property
    def flop(self) -> float:
        pairs = sum(self.chunk * limit - self.chunk * (self.chunk - 1) / 2 for limit in self.limits)
        return 4.0 * self.batch * HEADS * HEAD_DIM * pairs

    def kv_rows(self, tile_m: int, heads_together: bool) -> int:
        """Keys that thread blocks of tile_m rows bring, of all heads. heads_together: rows of a KV head's query heads
        share a block, those of both groups too; else a block has rows of one head and group."""
        per_kv = HEADS // HEADS_KV if heads_together else 1
        unit = tile_m // 8 if heads_together else tile_m  # rows of one head that stay together
        reaches = []
        for limit in sorted(self.limits, reverse=True):
            turns = range(-(-self.chunk // unit) - 1, -1, -1)
            reaches += [
                limit - self.chunk + min((turn + 1) * unit, self.chunk) for turn in turns for _ in range(per_kv)
            ]
        step = 8 if heads_together else 1
        return self.batch * (HEADS // per_kv) * sum(max(reaches[i : i + step]) for i in range(0, len(reaches), step))


def zigzag(keys: int, rank: int) -> Shape:
    chunk = keys // (2 * WORLD)
    return Shape(f"zigzag {keys}", rank, 1, keys, chunk, ((rank + 1) * chunk, (2 * WORLD - rank) * chunk))


SHAPES = [zigzag(keys, rank) for keys in (4096, 16384, 65536) for rank in range(WORLD)]
SHAPES += [
    Shape(f"{chunk} rows b{batch} {keys}", 0, batch, keys, chunk, (keys // 2, keys))
    for batch, keys in ((1, 65536), (16, 65536), (64, 16384))
    for chunk in (32, 64, 128)
]


def inputs(shape: Shape) -> tuple[torch.Tensor, ...]:
    """q0, q1, k and v."""
    sizes = [(shape.chunk, HEADS)] * 2 + [(shape.keys, HEADS_KV)] * 2
    return tuple(
        torch.randn(shape.batch * rows, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for rows, heads in sizes
    )


def in_mode(problem: AttentionProblem, occupancy: str) -> tuple[Plan, Callable]:
    target = target_of(torch.cuda.get_device_capability())
    plan = choose(problem, target)
    if occupancy == "sm120":
        plan = replace(plan, smem_bytes=padded_smem(plan.smem_bytes, plan.blocks_per_sm))
    return plan, launcher(problem, plan, target)


def marks(shape: Shape, rows: int) -> torch.Tensor:
    return torch.arange(shape.batch + 1, device="cuda", dtype=torch.int32) * rows


def results(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty(HEADS, q.shape[0], device="cuda")


def two_calls(shape: Shape, occupancy: str) -> tuple[Plan, Callable]:
    ways = {"packed_q": True, "packed_k": True, "seqused_k": True, "lse": True}
    plan, launch = in_mode(AttentionProblem("bfloat16", HEAD_DIM, HEAD_DIM, mask="causal", **ways), occupancy)
    used = [torch.full((shape.batch,), limit, device="cuda", dtype=torch.int32) for limit in shape.limits]
    lengths = [Lengths(marks(shape, shape.chunk), marks(shape, shape.keys), seqused_k=own) for own in used]
    numbers = Numbers(1 / math.sqrt(HEAD_DIM))

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        outs = []
        for q, own in zip(tensors[:2], lengths, strict=True):
            out, lse = results(q)
            launch(*Arguments(q, *tensors[2:], out, lse, own, numbers=numbers))
            outs.append(out)
        return outs

    return plan, call


def fused(shape: Shape, occupancy: str) -> tuple[Plan, Callable]:
    ways = {"packed_q": True, "packed_k": True, "lse": True, "dual_group": True}
    plan, launch = in_mode(AttentionProblem("bfloat16", HEAD_DIM, HEAD_DIM, mask="causal", **ways), occupancy)
    rows = marks(shape, shape.chunk)
    lengths = GroupLengths(rows, rows, marks(shape, shape.keys), *shape.limits)
    numbers = Numbers(1 / math.sqrt(HEAD_DIM))

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        (out0, lse0), (out1, lse1) = map(results, tensors[:2])
        launch(*DualGroupArguments(*tensors, out0, out1, lse0, lse1, lengths, numbers=numbers))
        return [out0, out1]

    return plan, call


def measure(shape: Shape, arguments: argparse.Namespace) -> dict:
    sets = [inputs(shape) for _ in range(1 if shape.batch > 1 else 3)]
    (plan_two, two), (plan_one, one) = two_calls(shape, arguments.occupancy), fused(shape, arguments.occupancy)
    pairs = zip(two(*sets[0]), one(*sets[0]), strict=True)
    difference = max((a.float() - b.float()).abs().max().item() for a, b in pairs)
    if not difference <= WRONG:
        raise RuntimeError(f"{shape.name}, rank {shape.rank}: differs by {difference:.2g}")
    before = median_ms(two, sets, repeats=arguments.repeats)
    ms = median_ms(one, sets, repeats=arguments.repeats)
    after = median_ms(two, sets, repeats=arguments.repeats)  # in turn: a GPU slows down as it gets warm
    two_ms = (before + after) / 2
    reads = [shape.kv_rows(plan_two.tile_m, False), shape.kv_rows(plan_one.tile_m, True)]
    row = {"shape": shape.name, "rank": shape.rank, "two_ms": two_ms, "fused_ms": ms, "speed_up": two_ms / ms}
    row |= {"two_tflops": shape.flop / two_ms / 1e9, "fused_tflops": shape.flop / ms / 1e9}
    gigabytes = [rows * 2 * HEAD_DIM * 2 / 1e9 for rows in reads]
    return row | {"two_kv_gb": gigabytes[0], "fused_kv_gb": gigabytes[1], "difference": difference}


def run_once(arguments: argparse.Namespace) -> None:
    """A launch that compiles, then the one to look at."""
    wanted = (arguments.shape, arguments.rank)
    shape = next((shape for shape in SHAPES if (shape.name, shape.rank) == wanted), None)
    if shape is None:
        raise SystemExit(f"--shape: expected one of {sorted({shape.name for shape in SHAPES})}, got {wanted}")
    _, call = {"fused": fused, "two": two_calls}[arguments.once](shape, arguments.occupancy)
    tensors = inputs(shape)
    for _ in range(2):
        call(*tensors)
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--occupancy", choices=("sm120", "device"), default="sm120")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--once", choices=("fused", "two"))
    parser.add_argument("--shape", default="zigzag 16384")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    if arguments.once:
        run_once(arguments)
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, occupancy {arguments.occupancy}\n")
    header = (
        "| shape | rank | two calls, ms | fused, ms | two / fused | TFLOPS | KV read, two, GB | KV read, fused, GB |"
    )
    lines = [header, "| --- " * 8 + "|"]
    print("\n".join(lines))
    rows = []
    for shape in SHAPES:
        row = measure(shape, arguments)
        rows.append(row)
        times = f"{row['two_ms']:.3f} | {row['fused_ms']:.3f} | {row['speed_up']:.2f} | {row['fused_tflops']:.0f}"
        reads = f"{row['two_kv_gb']:.2f} | {row['fused_kv_gb']:.2f}"
        lines.append(f"| {row['shape']} | {row['rank']} | {times} | {reads} |")
        print(lines[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"occupancy": arguments.occupancy, "rows": rows}, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
