"""What an instruction costs beside the matrix products: two warps a sub-partition, 16 products and 16 others in turn.

    python benchmarks/issue.py [--json FILE]

A cost is the time that 16 others add to 16 products, in sixteenths of what those take: 1 would be as long as a product.
It is what the others leave over where both warps go the same way, as the matrix warps of a tile nearly do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import cutlass
import torch
from cutlass import Float32, Int32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_attn_sm120 import launchers
from flash_attn_sm120.bench.timing import median_ms
from flash_attn_sm120.device.fragments import accumulators
from flash_attn_sm120.device.ptx import (
    byte_permute,
    exp2,
    fma,
    fp8_to_f16,
    mma_m16n8k16,
    multiply_wide,
    pack_pair,
    store_shared_v4,
)

THREADS = 256
PRODUCTS = 16
ROUNDS = 1 << 14


def _on_floats(step: Callable) -> Callable:
    return lambda word, other, shared: step(word.bitcast(Float32), other.bitcast(Float32)).bitcast(Int32)


def _store(word: Int32, other: Int32, shared: Int32) -> Int32:
    store_shared_v4(shared, [word, other, word, other])
    return word + other


OTHERS: dict[str, Callable | None] = {
    "nothing": None,
    "FFMA": _on_floats(lambda a, b: fma(a, b, b)),
    "FADD": _on_floats(lambda a, b: a + b),
    "FMNMX": _on_floats(lambda a, b: cute.arch.fmax(-a, b)),  # other than max(a, b), not the same the second time
    "MUFU.EX2": _on_floats(lambda a, _: exp2(a)),
    "F2FP.BF16": _on_floats(lambda a, b: pack_pair(a, b, "bf16").bitcast(Float32)),
    "F2FP.E4M3": lambda word, other, shared: fp8_to_f16(word, "e4m3")[0],
    "LOP3": lambda word, other, shared: word ^ other,
    "PRMT": lambda word, other, shared: byte_permute(word, other, 0x6240),
    "IMAD": lambda word, other, shared: word * other + other,
    "IMAD.WIDE, LOP3": lambda word, other, shared: multiply_wide(word, 0xD2511F53)[0] ^ other,
    "STS.128, IADD": _store,
}


class IssueLoop:
    """Every warp multiplies the same registers PRODUCTS times a round, then does as many steps of another kind."""

    def __init__(self, other: Callable | None):
        self.other = other

    @cute.jit
    def __call__(self, mOut: cute.Tensor, rounds: Int32, stream):
        """mOut (blocks, THREADS) float32."""
        self.kernel(mOut, rounds).launch(
            grid=(mOut.shape[0], 1, 1), block=(THREADS, 1, 1), smem=16 * THREADS * PRODUCTS, stream=stream
        )

    @cute.kernel
    def kernel(self, mOut: cute.Tensor, rounds: Int32):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        shared = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=16).toint() + 16 * thread
        operands = [Int32(0x3F803F80) + Int32(0x00010001) * ((thread + 11 * i) % 64) for i in range(6)]
        words = cute.make_rmem_tensor((PRODUCTS + 1,), Int32)
        for i in cutlass.range_constexpr(PRODUCTS + 1):
            words[i] = operands[i % 6] + i
        sums = accumulators(1, PRODUCTS)
        sums.fill(0.0)
        for _ in cutlass.range(rounds, unroll=1):
            for n in cutlass.range_constexpr(PRODUCTS):
                product = mma_m16n8k16(operands[:4], operands[4:], [sums[0, n, i] for i in range(4)], "bf16")
                for i in cutlass.range_constexpr(4):
                    sums[0, n, i] = product[i]
            if cutlass.const_expr(self.other is not None):
                for i in cutlass.range_constexpr(PRODUCTS):
                    words[i] = self.other(words[i], words[PRODUCTS], shared + 16 * THREADS * i)
        total = Float32(0.0)
        for n in cutlass.range_constexpr(PRODUCTS):
            for i in cutlass.range_constexpr(4):
                total = total + sums[0, n, i]
            total = total + Float32(words[n])
        mOut[block, thread] = total


def build(other: Callable | None, target: str) -> Callable:
    """The launcher for a target such as "sm_120a"."""
    out = make_fake_tensor(Float32, (cute.sym_int32(), THREADS), (THREADS, 1), assumed_align=16)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(IssueLoop(other), out, Int32(0), stream, options=f"--enable-tvm-ffi --gpu-arch {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.cuda.current_device()
    out = torch.empty(torch.cuda.get_device_properties(device).multi_processor_count, THREADS, device="cuda")
    calls = {name: build(other, launchers.target(device)) for name, other in OTHERS.items()}
    ms = {name: median_ms(call, [(out, ROUNDS)]) for name, call in calls.items()}
    costs = {name: time / ms["nothing"] - 1 for name, time in ms.items() if name != "nothing"}
    print("| beside 16 products, 16 of | cost of one, in products |\n| --- | --- |")
    for name, cost in costs.items():
        print(f"| {name} | {cost:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "costs": costs}, indent=1))


if __name__ == "__main__":
    main()
