"""The 64 configurations that every kernel is held to, and the rule they pass by: for tests/test_matrix.py and `check`.

Heads as in real models x dense or ragged x dtype x causal or not x batch, head_dim 128, no length a multiple of a tile.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass

import torch

from flash_attn_sm120 import reference
from flash_attn_sm120.interface import flash_attn_func, flash_attn_varlen_func

HEAD_DIM = 128
MAX_DIFF = 0.0156
SLACK = 1e-5
LSE_SLACK = 1e-3  # the log-sum-exp doesn't see the rounding of the output, but that of tanh and exp2
HEADS = {"MHA": (8, 8), "GQA Qwen3": (16, 8), "GQA LLaMA-3": (32, 8), "MQA": (8, 1)}
SIZES = {"short": (1, 200), "full": (257, 1100)}  # the range that lengths are from
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Config:
    """One cell of the matrix."""

    kind: str
    varlen: bool
    dtype: str
    causal: bool
    batch: int

    @property
    def heads(self) -> tuple[int, int]:
        """(heads, heads_kv)"""
        return HEADS[self.kind]

    @property
    def name(self) -> str:
        form, mask = "varlen" if self.varlen else "dense", "causal" if self.causal else "full"
        return f"{self.kind.replace(' ', '-')}-{form}-{self.dtype}-{mask}-b{self.batch}"


@dataclass(frozen=True, slots=True)
class Result:
    """What a configuration gave. Differences are largest absolute ones, against float32."""

    config: Config
    max_diff: float
    same_dtype_diff: float
    lse_diff: float
    same_dtype_lse_diff: float

    @property
    def complaints(self) -> list[str]:
        """Why it didn't pass, in words; empty when it did. A NaN fails every comparison."""
        limit = 2 * self.same_dtype_diff + SLACK
        lse_limit = 2 * self.same_dtype_lse_diff + LSE_SLACK
        found = []
        if not self.max_diff <= MAX_DIFF:
            found.append(f"max diff {self.max_diff:.5f} > {MAX_DIFF}")
        if not self.max_diff <= limit:
            found.append(f"max diff {self.max_diff:.5f} > {limit:.5f}, twice that of {self.config.dtype} PyTorch")
        if not self.lse_diff <= lse_limit:
            found.append(f"lse diff {self.lse_diff:.5f} > {lse_limit:.5f}")
        return found

    @property
    def passed(self) -> bool:
        return not self.complaints


def configs() -> list[Config]:
    """All 64, in a fixed order."""
    axes = itertools.product(HEADS, (False, True), DTYPES, (False, True), (1, 3))
    return [Config(*axis) for axis in axes]


def run(config: Config, device: torch.device | str, size: str = "full", seed: int = 0) -> Result:
    """Random inputs of `seed` through the public functions into a NaN-filled out, against float32.

    size: "full", or "short" for a device that takes its time (lengths 1 to 200).
    """
    generator = torch.Generator().manual_seed(zlib.crc32(config.name.encode()) + seed)
    dtype = DTYPES[config.dtype]
    heads, heads_kv = config.heads
    lengths_q, lengths_k = (_lengths(config, size, generator) for _ in range(2))
    options = {"causal": config.causal}
    arguments = {}
    if config.varlen:
        shapes = [(sum(lengths_q), heads), (sum(lengths_k), heads_kv), (sum(lengths_k), heads_kv)]
        cu_seqlens = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths_q, lengths_k)]
        arguments["cu_seqlens_q"], arguments["cu_seqlens_k"] = (marks.to(device) for marks in cu_seqlens)
        hints = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    else:
        rows_q, rows_k = (config.batch, lengths_q[0]), (config.batch, lengths_k[0])
        shapes = [(*rows_q, heads), (*rows_k, heads_kv), (*rows_k, heads_kv)]
    q, k, v = (torch.randn((*shape, HEAD_DIM), generator=generator).to(device, dtype) for shape in shapes)
    out = torch.full_like(q, math.nan)
    if config.varlen:
        _, lse = flash_attn_varlen_func(q, k, v, **arguments, **hints, **options, out=out, return_lse=True)
    else:
        _, lse = flash_attn_func(q, k, v, **options, out=out, return_lse=True)
    exact, exact_lse = reference.attention(q, k, v, **arguments, **options)
    rounded, rounded_lse = reference.attention(q, k, v, **arguments, **options, dtype=None)
    diffs = ((out, exact), (rounded, exact), (lse, exact_lse), (rounded_lse, exact_lse))
    return Result(config, *(largest_difference(*pair) for pair in diffs))


def _lengths(config: Config, size: str, generator: torch.Generator) -> list[int]:
    """One length a sequence; ragged ones hold a short one where there are three. No multiples of a tile's 16 rows."""
    low, high = SIZES[size]
    count = config.batch if config.varlen else 1
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    lengths = [length + 1 if length % 16 == 0 else length for length in lengths]
    if count > 1:
        lengths[1] = 1 + lengths[1] % 15
    return lengths


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected|, with -inf equal to -inf; NaN where either has one or the infinities disagree."""
    actual, expected = actual.float(), expected.float()
    if actual.numel() == 0:
        return 0.0
    difference = torch.where(actual == expected, 0.0, (actual - expected).abs())
    return difference.max().item() if difference.isfinite().all() else math.nan
