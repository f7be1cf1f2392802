"""What a fresh process waits for: imports, its first calls from each kind of file and from the compiler, steady calls.

python benchmarks/startup.py [--json FILE]    needs a GPU; each line is a process of its own, the median of --rounds

Kernels that came with the package are those of an installed platform wheel, or of FLASH_ATTN_SM120_PRECOMPILED. Beside
them, flash-attn-4 where it is installed, in the same run. CUDA is started before the clock is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WAYS = ("precompiled", "JIT", "cached", "flash-attn-4")
COLUMNS = {
    "import_s": "import beyond torch, s",
    "first_s": "first call, s",
    "decode_s": "first decode, s",
    "steady_us": "steady call, us",
    "compiler": "compiler imported",
    "peak_mb": "memory added at most, MB",
    "off": "largest error",
}
CHILD = """
import json, resource, statistics, sys, time
import torch
way = sys.argv[1]
torch.zeros(1, device="cuda")
torch.randn(2, 2, device="cuda").bfloat16() @ torch.randn(2, 2, device="cuda").bfloat16()
shape = (1, 512, 16, 128)
q, k, v = (torch.randn(shape, device="cuda").bfloat16() for _ in range(3))
one = q[:, :1].contiguous()
expected = torch.nn.functional.scaled_dot_product_attention(
    *(x.transpose(1, 2).float() for x in (q, k, v)), is_causal=True).transpose(1, 2)
torch.cuda.synchronize()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
def timed(run):
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result
def load():
    if way == "flash-attn-4":
        from flash_attn.cute import flash_attn_func
    else:
        from flash_attn_sm120 import flash_attn_func
    return flash_attn_func
import_s, attend = timed(load)
first_s, out = timed(lambda: attend(q, k, v, causal=True))
out = out[0] if isinstance(out, tuple) else out
decode_s, _ = timed(lambda: attend(one, k, v, causal=True))
found = {"import_s": import_s, "first_s": first_s, "decode_s": decode_s, "peak_mb": peak() - before}
found["off"] = (out.float() - expected).abs().max().item()
small = q[:, :32].contiguous()
for _ in range(50):
    attend(small, small, small, causal=True)
rounds = []
for _ in range(15):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        attend(small, small, small, causal=True)
    rounds.append((time.perf_counter() - start) / 200 * 1e6)
found["steady_us"] = statistics.median(rounds)
found["compiler"] = "cutlass" in sys.modules
print(json.dumps(found))
"""


def multiprocessors() -> int:
    import torch

    return torch.cuda.get_device_properties(0).multi_processor_count


def measure(way: str, cache: str) -> dict[str, Any] | None:
    """One process; None where it fails, whose last line of complaint is printed."""
    environment = os.environ | {"FLASH_ATTN_SM120_CACHE_DIR": cache}
    if way == "precompiled":
        environment["FLASH_ATTN_SM120_NO_JIT"] = "1"
    elif way != "flash-attn-4":
        environment["FLASH_ATTN_SM120_PRECOMPILED"] = str(Path(cache, "nothing"))
    else:
        environment.setdefault("FLASH_ATTENTION_ARCH", "sm_120")
        environment.setdefault("FLASH_ATTENTION_NUM_SMS", str(multiprocessors()))
    answer = subprocess.run(
        [sys.executable, "-c", CHILD, way], env=environment, cwd="/", capture_output=True, text=True
    )
    if answer.returncode:
        print(f"{way}: {(answer.stderr.strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
        return None
    return json.loads(answer.stdout.splitlines()[-1])


def measure_all(rounds: int) -> dict[str, dict[str, Any]]:
    """The ways in turn, so that what drifts meets all of them; each JIT starts with an empty cache."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for way in WAYS:
                one = measure(way, cache)
                if one is not None:
                    found[way].append(one)
    return {
        way: {name: statistics.median(each[name] for each in runs) for name in COLUMNS}
        for way, runs in found.items()
        if runs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    import torch

    from flash_attn_sm120 import __version__

    found = measure_all(arguments.rounds)
    print(f"flash_attn_sm120 {__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}\n")
    print("| way | " + " | ".join(COLUMNS.values()) + " |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    for way, numbers in found.items():
        cells = [
            f"{numbers[name]:.3g}" if name != "compiler" else ("yes" if numbers[name] else "no") for name in COLUMNS
        ]
        print(f"| {way} | " + " | ".join(cells) + " |")
    if arguments.json:
        head = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rounds": arguments.rounds}
        arguments.json.write_text(json.dumps(head | {"ways": found}, indent=1))


if __name__ == "__main__":
    main()
