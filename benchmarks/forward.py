"""Dense prefill: this package against PyTorch's SDPA (flash, cuDNN) and flash-attn-4's sm_120 kernel where installed.

    python benchmarks/forward.py [--occupancy sm120] [--cells issue|windows|head_dims] [--json FILE]

TFLOPS count 2 * heads * (head_dim + head_dim_v) FLOP for each visible (query, key) pair. --occupancy sm120 pads the
dynamic shared memory of our launches so that no more blocks are resident on an SM than SM120 could hold. cuDNN may use
instructions that SM120 lacks and is shown for reference only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import median_ms
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_sm120.compile import build
from flash_attn_sm120.dispatch import choose, plan_for
from flash_attn_sm120.problem import AttentionProblem


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


SIZES = ((4, 4096), (1, 16384))
ISSUE = [Cell(b, s, mask=mask) for mask in ("full", "causal") for b, s in SIZES]
WINDOWS = [Cell(1, 16384, mask="causal", window=window) for window in (None, 1023, 127)]
DIMS = [
    Cell(b, s, 16, heads_kv, d, dv, mask)
    for d, dv in ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
    for heads_kv in (16, 4)
    for mask in ("full", "causal")
    for b, s in ((16, 1024), *SIZES)
]
CELLS = {"issue": ISSUE, "windows": WINDOWS, "head_dims": DIMS}


def as_on_sm120(plan, shared_per_sm: int):
    """The plan with shared memory padded so that exactly blocks_per_sm blocks fit an SM with shared_per_sm bytes."""
    padded = shared_per_sm // (plan.blocks_per_sm + 1) - 1024 + 16
    return replace(plan, smem_bytes=max(plan.smem_bytes, padded // 16 * 16))


def ours(cell: Cell, occupancy: str, kernel: str) -> Callable:
    properties = torch.cuda.get_device_properties(0)
    target = f"sm_{properties.major}{properties.minor}a"
    plan = choose(cell.problem, target) if kernel == "auto" else plan_for(kernel, cell.problem)
    if occupancy == "sm120":
        plan = as_on_sm120(plan, properties.shared_memory_per_multiprocessor)
    launch = build(cell.problem, plan, target)
    left = -1 if cell.window is None else cell.window
    scale = 1 / math.sqrt(cell.head_dim)

    def call(q, k, v):
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        launch(q, k, v, out, None, None, None, None, None, scale, 0.0, left, 0, None)
        return out

    return call


def sdpa(cell: Cell, backend: SDPBackend) -> Callable:
    def call(q, k, v):
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            causal = cell.mask == "causal"
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=cell.heads != cell.heads_kv)
            return out.transpose(1, 2)

    return call


def flash_attn_4(cell: Cell) -> Callable:
    from flash_attn.cute import flash_attn_func

    window = (None, None) if cell.window is None else (cell.window, 0)

    def call(q, k, v):
        out = flash_attn_func(q, k, v, causal=cell.mask == "causal", window_size=window)
        return out[0] if isinstance(out, tuple) else out

    return call


def peers(cell: Cell, wanted: list[str]) -> dict[str, Callable]:
    makers = {
        "sdpa_flash": lambda: sdpa(cell, SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": lambda: sdpa(cell, SDPBackend.CUDNN_ATTENTION),
        "flash_attn_4": lambda: flash_attn_4(cell),
    }
    return {name: makers[name]() for name in wanted if cell.window is None or name == "flash_attn_4"}


def measure(cell: Cell, occupancy: str, kernel: str, wanted: list[str]) -> dict:
    def inputs() -> tuple:
        shapes = [(cell.heads, cell.head_dim), (cell.heads_kv, cell.head_dim), (cell.heads_kv, cell.head_dim_v)]
        size = (cell.batch, cell.seqlen)
        return tuple(torch.randn(*size, *shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)

    sets = [inputs() for _ in range(3)]
    row: dict = {"cell": cell.name, **asdict(cell)}
    expected = None
    for name, call in {"ours": ours(cell, occupancy, kernel), **peers(cell, wanted)}.items():
        try:
            out = call(*sets[0])
            ms = median_ms(call, sets)
        except Exception as error:  # a peer that lacks a feature is a fact for the table
            if name == "ours":
                raise
            row[name] = f"{type(error).__name__}"
            continue
        expected = out if expected is None else expected
        row[f"{name}_ms"] = ms
        row[name] = cell.flop / ms / 1e9
        row[f"{name}_difference"] = (out.float() - expected.float()).abs().max().item()
    return row


def show(rows: list[dict], names: list[str]) -> str:
    lines = ["| cell | ms | " + " | ".join(names) + " | ours / sdpa_flash |", "| --- " * (len(names) + 3) + "|"]
    for row in rows:
        values = [row.get(name, "") for name in names]
        texts = [f"{value:.0f}" if isinstance(value, float) else str(value) for value in values]
        base = row.get("sdpa_flash")
        ratio = f"{row['ours'] / base:.2f}" if isinstance(base, float) else ""
        lines.append(f"| {row['cell']} | {row['ours_ms']:.3f} | " + " | ".join(texts) + f" | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--occupancy", choices=("sm120", "device"), default="sm120")
    parser.add_argument("--kernel", choices=("auto", "forward", "forward_tma"), default="auto")
    parser.add_argument("--cells", choices=CELLS, default="issue")
    parser.add_argument("--peers", default="sdpa_flash,sdpa_cudnn", help="comma list; flash_attn_4 too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = [name for name in arguments.peers.split(",") if name]
    if "flash_attn_4" in wanted:
        os.environ.setdefault("FLASH_ATTENTION_ARCH", "sm_120")
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        os.environ.setdefault("FLASH_ATTENTION_NUM_SMS", str(sms))
    rows = [measure(cell, arguments.occupancy, arguments.kernel, wanted) for cell in CELLS[arguments.cells]]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, TFLOPS, occupancy {arguments.occupancy}\n")
    print(show(rows, ["ours", *wanted]))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
