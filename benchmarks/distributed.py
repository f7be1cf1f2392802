"""Attention over several GPUs against the same on one: equality, scaling, overlap, memory.

    torchrun --nproc-per-node 2 benchmarks/distributed.py [--tokens 131072] [--json FILE] [--markdown FILE]
    python benchmarks/distributed.py --plot results.json out.png

Causal, bf16, 32 heads, 8 KV heads, head_dim 128, over NCCL; worlds of 1, 2, 4, ... up to the processes started. Strong:
`tokens` in all. Weak: tokens / 4 a GPU. Milliseconds: median of CUDA events of the slowest rank, without the message
that all ranks exchange before (check_ranks=False), which is measured by itself. One GPU: flash_attn_func.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func
from flash_attn_sm120.distributed import (
    decode_context_parallel,
    ring_attention,
    ring_attention_varlen,
    shard,
    shard_varlen,
    zigzag_attention,
    zigzag_attention_varlen,
)

HEADS, HEADS_KV, HEAD_DIM = 32, 8, 128
WAYS: dict[str, Callable] = {"zigzag": zigzag_attention, "ring": ring_attention}
RAGGED = [5000, 0, 12345, 777, 1, 9001]
WRONG = 2**-5  # out in bf16: each of two ways rounds values of up to 4 by 2**-7
WRONG_LSE = 1e-3
REPEATS = 5
MIB = 2**20


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The same on every rank."""
    return torch.randn(shape, device="cuda", dtype=dtype)


def qkv(tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """(1, tokens, heads, head_dim) each."""
    torch.manual_seed(tokens)
    return [rand(1, tokens, heads, HEAD_DIM, dtype=dtype) for heads in (HEADS, HEADS_KV, HEADS_KV)]


def flop(tokens: int) -> float:
    return 4.0 * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2


def worst(value: float, group: Any = None) -> float:
    """Over the ranks of a group."""
    every = torch.tensor([value], device="cuda", dtype=torch.float64)
    dist.all_reduce(every, op=dist.ReduceOp.MAX, group=group)
    return every.item()


def median_ms(call: Callable[[], Any], group: Any, repeats: int = REPEATS) -> float:
    """Of the slowest rank; a warm-up comes first."""
    call()
    dist.barrier(group=group)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return worst(median(begin.elapsed_time(end) for begin, end in pairs), group)


def difference(found: tuple, expected: tuple, name: str, group: Any = None) -> dict[str, float]:
    """Largest of out and lse on any rank. Raises RuntimeError where that is more than rounding."""
    pairs = list(zip(found, expected, strict=True))
    out, lse = ((a.float() - b.float()).abs().max().item() if a.numel() else 0.0 for a, b in pairs)
    out, lse = worst(out, group), worst(lse, group)
    if not (out <= WRONG and lse <= WRONG_LSE):
        raise RuntimeError(f"{name}: out differs by {out:.3g}, lse by {lse:.3g}")
    return {"out": out, "lse": lse}


def equal(rank: int, world: int) -> dict[str, dict[str, float]]:
    """Ragged sequences, windows, sinks, float16, decode, against one GPU."""
    found = {}
    torch.manual_seed(7)
    where = torch.tensor([0, *RAGGED], device="cuda").cumsum(0, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (rand(sum(RAGGED), heads, HEAD_DIM, dtype=dtype) for heads in (HEADS, HEADS_KV, HEADS_KV))
        own, sink = [shard_varlen(x, RAGGED, rank, world) for x in (q, k, v)], rand(HEADS)
        cases: list[tuple[str, Callable, dict[str, Any]]] = [
            ("zigzag", zigzag_attention_varlen, {"causal": True}),
            ("ring", ring_attention_varlen, {"causal": True}),
        ]
        if dtype == torch.bfloat16:
            window = {"causal": True, "window_size": (700, 0), "learnable_sink": sink}
            cases.append(("zigzag, window, sink", zigzag_attention_varlen, window))
            cases.append(("ring, full, sink", ring_attention_varlen, {"causal": False, "learnable_sink": sink}))
        for name, function, options in cases:
            longest = max(RAGGED)
            out, lse = flash_attn_varlen_func(q, k, v, where, where, longest, longest, return_lse=True, **options)
            expected = tuple(shard_varlen(x, RAGGED, rank, world, dim) for dim, x in enumerate((out, lse)))
            name = f"{name}, {str(dtype).removeprefix('torch.')}"
            found[name] = difference(function(*own, RAGGED, **options), expected, name)
    total = torch.tensor([30000, 17, 65536, 4097], device="cuda", dtype=torch.int32)
    q, k, v = (rand(4, tokens, heads, HEAD_DIM) for tokens, heads in ((1, HEADS), (65536, HEADS_KV), (65536, HEADS_KV)))
    expected = flash_attn_func(q, k, v, seqused_k=total, causal=True, return_lse=True)
    own = [x[:, rank::world] for x in (k, v)]
    found["decode"] = difference(decode_context_parallel(q, *own, total), expected, "decode")
    return found


def scaling(tokens: Callable[[int], int], worlds: Iterable[int], groups: dict[int, Any]) -> list[dict]:
    """tokens(world): in all. Rows of one GPU's call and of each way at each world."""
    rows = []
    for world in worlds:
        count, rank = tokens(world), dist.get_rank()
        if rank < world:
            whole, group = qkv(count), groups[world]
            expected = flash_attn_func(*whole, causal=True, return_lse=True)
            mine = (shard(expected[0], rank, world), shard(expected[1], rank, world, 2))
            row = {"world": world, "tokens": count, "ms": {}, "tflops_a_gpu": {}, "difference": {}}
            if world == 1:
                row["ms"]["one GPU"] = median_ms(lambda: flash_attn_func(*whole, causal=True), group)  # noqa: B023
            own = [shard(x, rank, world) for x in whole]
            del expected, whole
            for way, function in WAYS.items():
                if world == 1 and way == "ring":
                    continue  # the same as zigzag
                call = lambda: function(*own, group, check_ranks=False)  # noqa: B023, E731
                row["difference"][way] = difference(call(), mine, f"{way} of {world}", group)
                row["ms"][way] = median_ms(call, group)
            row["tflops_a_gpu"] = {way: flop(count) / world / ms / 1e9 for way, ms in row["ms"].items()}
            rows.append(row)
            if rank == 0:
                print(json.dumps(row), flush=True)
        torch.cuda.empty_cache()
        dist.barrier()
    return rows


def memory(tokens_a_gpu: int, worlds: Iterable[int], groups: dict[int, Any]) -> list[dict]:
    """MiB of the peak beyond q, k and v, at the same tokens a GPU."""
    rows = []
    for world in worlds:
        rank = dist.get_rank()
        if rank < world:
            own = qkv(tokens_a_gpu)
            row: dict[str, Any] = {"world": world, "tokens_a_gpu": tokens_a_gpu}
            for way, function in WAYS.items():
                function(*own, groups[world], check_ranks=False)
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                function(*own, groups[world], check_ranks=False)
                torch.cuda.synchronize()
                row[way] = worst((torch.cuda.max_memory_allocated() - before) / MIB, groups[world])
            rows.append(row)
        dist.barrier()
    return rows


def overlap(tokens: int, rank: int, world: int) -> dict[str, dict[str, float]]:
    """Of each way: ms of NCCL kernels on this rank, what shares of it have other kernels beside, and the call's ms."""
    own = [shard(x, rank, world) for x in qkv(tokens)]
    found = {}
    for way, function in WAYS.items():
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            # The profiler itself takes its time to begin, on each rank another.
            function(*own, check_ranks=False)
            dist.barrier()
            torch.cuda.synchronize()
            with torch.profiler.record_function("measured"):
                function(*own, check_ranks=False)
                torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            profile.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        begin = min(event["ts"] for event in events if event.get("name") == "measured" and "ts" in event)
        kernels = [event for event in events if event.get("cat") == "kernel" and event["ts"] >= begin]
        found[way] = under(kernels)
        if rank == 0 and not found[way]["nccl_ms"]:
            print("no NCCL kernel among", sorted({event["name"][:60] for event in kernels}), flush=True)
    return found


def under(kernels: list[dict]) -> dict[str, float]:
    """kernels: of a trace, with name, ts and dur in microseconds. Others: all but NCCL's."""
    spans: dict[str, list[tuple[float, float]]] = {"nccl": [], "attention": [], "others": []}
    for event in kernels:
        span = (event["ts"], event["ts"] + event["dur"])
        if "nccl" in event["name"].lower():
            spans["nccl"].append(span)
            continue
        spans["others"].append(span)
        if re.search("flash_attn_sm120|dual_?group", event["name"], re.IGNORECASE):
            spans["attention"].append(span)
    sending = sum(end - start for start, end in spans["nccl"])
    every = [time for span in spans["nccl"] + spans["attention"] for time in span] or [0.0]
    attention, others = joined(spans["attention"]), joined(spans["others"])
    return {
        "nccl_ms": sending / 1e3,
        "share_under_attention": both(spans["nccl"], attention) / sending if sending else 0.0,
        "share_under_others": both(spans["nccl"], others) / sending if sending else 0.0,
        "attention_ms": sum(b - a for a, b in attention) / 1e3,
        "first_to_last_ms": (max(every) - min(every)) / 1e3,
        "nccl_kernels": len(spans["nccl"]),
    }


def joined(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """What overlaps is one span."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            start, end = found[-1][0], max(found.pop()[1], end)
        found.append((start, end))
    return found


def both(spans: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """Of the first spans, the time in which one of the others runs."""
    return sum(max(0.0, min(end, b) - max(start, a)) for start, end in spans for a, b in others)


def message_us(rank: int, world: int) -> dict[str, float]:
    """Host microseconds of a short call, with the message that all ranks exchange before, and without."""
    own = [shard(x, rank, world) for x in qkv(2048 * world)]
    found = {}
    for name, check in (("with", True), ("without", False)):
        for _ in range(20):
            zigzag_attention(*own, check_ranks=check)
        torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(100):
            zigzag_attention(*own, check_ranks=check)
        found[name] = worst((time.perf_counter() - begin) * 1e4)
        torch.cuda.synchronize()
    return found


def table(found: dict) -> str:
    """Markdown."""
    lines = []
    for name in ("strong", "weak"):
        lines += [
            f"| {name}: GPUs | tokens | way | ms | TFLOPS a GPU | of one GPU's | out differs by |",
            "| --- " * 7 + "|",
        ]
        alone = found[name][0]["tflops_a_gpu"]["one GPU"]
        for row in found[name]:
            for way, ms in row["ms"].items():
                speed = row["tflops_a_gpu"][way]
                off = row["difference"].get(way, {"out": 0.0})["out"]
                cells = f"{row['tokens']} | {way} | {ms:.2f} | {speed:.0f} | {speed / alone:.2f} | {off:.1e}"
                lines.append(f"| {row['world']} | {cells} |")
        lines.append("")
    lines += ["| GPUs | tokens a GPU | zigzag: MiB beside q, k, v | ring: MiB |", "| --- " * 4 + "|"]
    for row in found["memory"]:
        lines.append(f"| {row['world']} | {row['tokens_a_gpu']} | {row['zigzag']:.0f} | {row['ring']:.0f} |")
    head = "| way | NCCL kernels, ms | under attention kernels | under any others | attention, ms | all, ms |"
    lines += ["", head, "| --- " * 6 + "|"]
    for way, row in found["overlap"].items():
        times = f"{row['attention_ms']:.2f} | {row['first_to_last_ms']:.2f}"
        shares = f"{row['share_under_attention']:.0%} | {row['share_under_others']:.0%}"
        lines.append(f"| {way} | {row['nccl_ms']:.2f} | {shares} | {times} |")
    lines += ["", "| against one GPU | out differs by | lse |", "| --- " * 3 + "|"]
    lines += [f"| {name} | {row['out']:.1e} | {row['lse']:.1e} |" for name, row in found["equal"].items()]
    us = found["message_us"]
    lines += [
        "",
        f"A short call takes {us['with']:.0f} us of host time with the ranks' message, {us['without']:.0f} without.",
    ]
    return "\n".join(lines) + "\n"


def plot(found: dict, path: Path) -> None:
    """Strong scaling as milliseconds, weak scaling as TFLOPS a GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = {"zigzag": "#009E73", "ring": "#0072B2"}
    alone = {name: found[name][0] for name in ("strong", "weak")}
    worlds = [row["world"] for row in found["strong"]]
    ideal = [alone["strong"]["ms"]["one GPU"] / world for world in worlds]
    left.plot(worlds, ideal, "--", color="#999999", label="one GPU's time / GPUs")
    right.axhline(alone["weak"]["tflops_a_gpu"]["one GPU"], linestyle="--", color="#999999", label="one GPU")
    for axes, name, key in ((left, "strong", "ms"), (right, "weak", "tflops_a_gpu")):
        for way, colour in colours.items():
            points = [(row["world"], row[key][way]) for row in found[name] if way in row[key]]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=way)
        axes.set_xticks(worlds)
        axes.set_xlabel("GPUs")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.legend(frameon=False)
    left.set_title(f"{alone['strong']['tokens']} tokens in all, ms")
    right.set_title(f"{alone['weak']['tokens']} tokens a GPU, TFLOPS a GPU")
    figure.suptitle(
        f"Causal attention, bf16, h{HEADS}/{HEADS_KV}, head_dim {HEAD_DIM}; {found['device']}, NCCL", fontsize=10
    )
    figure.savefig(path, dpi=160)


def measure(tokens: int, local: int, options: Any = None) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    worlds = [count for count in (1, 2, 4, 8) if count <= world]
    groups = {count: dist.new_group(list(range(count)), pg_options=options) for count in worlds}
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(local), "torch": torch.__version__, "world": world}
    began = time.perf_counter()
    steps: dict[str, Callable[[], Any]] = {
        "equal": lambda: equal(rank, world),
        "strong": lambda: scaling(lambda _: tokens, worlds, groups),
        "weak": lambda: scaling(lambda count: tokens // 4 * count, worlds, groups),
        "memory": lambda: memory(tokens // 4, worlds, groups),
        "overlap": lambda: overlap(tokens, rank, world),
        "message_us": lambda: message_us(rank, world),
    }
    for name, step in steps.items():
        found[name] = step()
        torch.cuda.empty_cache()
        if rank == 0:
            print(f"{name}: done after {time.perf_counter() - began:.0f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--high-priority", action="store_true", help="NCCL's kernels go before others")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "PNG"))
    arguments = parser.parse_args()
    if arguments.plot:
        plot(json.loads(arguments.plot[0].read_text()), arguments.plot[1])
        return
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=arguments.high_priority)
    dist.init_process_group("nccl", timeout=timedelta(seconds=120), pg_options=options)
    local = dist.get_rank() % torch.cuda.device_count()
    torch.cuda.set_device(local)
    found = measure(arguments.tokens, local, options)
    if dist.get_rank() == 0:
        print(table(found))
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        if arguments.markdown:
            arguments.markdown.write_text(table(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
