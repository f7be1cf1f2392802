"""Host time of a steady call: many calls of a problem so small that the GPU is never the one to wait for.

python benchmarks/host.py
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func
from flash_attn_sm120.arguments import Arguments, Numbers
from flash_attn_sm120.checks import target_of
from flash_attn_sm120.loader import load
from flash_attn_sm120.problem import AttentionProblem


def host_us(call: Callable[[], object], calls: int = 200, rounds: int = 15) -> float:
    """Median over rounds of microseconds a call, without waiting for the GPU inside a round."""
    for _ in range(50):
        call()
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(found)


def main() -> None:
    q = torch.randn(1, 16, 2, 128, device="cuda", dtype=torch.bfloat16)
    packed, marks = q[0], torch.tensor([0, 16], device="cuda", dtype=torch.int32)
    out = torch.empty_like(q)
    rows = torch.randn(1, 32, 2, 128, device="cuda", dtype=torch.bfloat16)  # more than a decode has
    heads_first = q.transpose(1, 2)
    calls = {
        "flash_attn_func": lambda: flash_attn_func(q, q, q),
        "flash_attn_func, causal, out=": lambda: flash_attn_func(q, q, q, causal=True, out=out),
        "flash_attn_func, return_lse": lambda: flash_attn_func(q, q, q, return_lse=True),
        "flash_attn_varlen_func": lambda: flash_attn_varlen_func(packed, packed, packed, marks, marks, 16, 16),
        "flash_attn_func, prefill": lambda: flash_attn_func(rows, rows, rows, causal=True),
        "torch SDPA": lambda: F.scaled_dot_product_attention(heads_first, heads_first, heads_first),
    }
    launcher = load(AttentionProblem("bfloat16", 128, 128), target_of(torch.cuda.get_device_capability()))
    arguments = Arguments(q, q, q, out, numbers=Numbers(0.1))
    calls["the launcher alone"] = lambda: launcher(*arguments, None)
    longer = torch.randn(1, 5000, 2, 128, device="cuda", dtype=torch.bfloat16)
    lengths = itertools.count(1)

    def never_seen() -> torch.Tensor:
        keys = longer[:, : next(lengths)]
        return flash_attn_func(q, keys, keys)

    calls["flash_attn_func, lengths never seen"] = lambda: never_seen()
    print("| call | host us |\n| --- | --- |")
    for name, call in calls.items():
        print(f"| {name} | {host_us(call):.1f} |")


if __name__ == "__main__":
    main()
