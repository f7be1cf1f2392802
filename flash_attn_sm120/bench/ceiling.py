"""What this GPU gives at most: mma.sync bf16 with float32 sums, device copies and reads.

    python benchmarks/ceiling.py [--json FILE]

The kernels are this package's own; each function is for other benchmarks to call in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cutlass
import torch
from cutlass import Float32, Int32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_attn_sm120 import launchers
from flash_attn_sm120.bench.timing import median_ms
from flash_attn_sm120.device.fragments import accumulators
from flash_attn_sm120.device.ptx import mma_m16n8k16

THREADS = 256
BLOCKS_PER_SM = 2
PRODUCTS = 16  # independent sums of a warp
ROUNDS = 1 << 15
MMA_FLOP = 2 * 16 * 8 * 16
READ_BLOCKS_PER_SM = 8
IN_FLIGHT = 8  # 16-byte loads of a thread
BYTES = 4 << 30  # far beyond any L2


class MmaLoop:
    """Every warp multiplies the same registers again and again, PRODUCTS times a round, and stores what it summed."""

    @cute.jit
    def __call__(self, mOut: cute.Tensor, rounds: Int32, stream):
        """mOut (blocks, THREADS) float32."""
        self.kernel(mOut, rounds).launch(grid=(mOut.shape[0], 1, 1), block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, mOut: cute.Tensor, rounds: Int32):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        # pairs of bf16 from 1 up, other ones in each lane: zeros would draw less power than real data
        words = [Int32(0x3F803F80) + Int32(0x00010001) * ((thread + 11 * i) % 64) for i in range(6)]
        sums = accumulators(1, PRODUCTS)
        sums.fill(0.0)
        for _ in cutlass.range(rounds, unroll=1):
            for n in cutlass.range_constexpr(PRODUCTS):
                product = mma_m16n8k16(words[:4], words[4:], [sums[0, n, i] for i in range(4)], "bf16")
                for i in cutlass.range_constexpr(4):
                    sums[0, n, i] = product[i]
        total = Float32(0.0)
        for n in cutlass.range_constexpr(PRODUCTS):
            for i in cutlass.range_constexpr(4):
                total = total + sums[0, n, i]
        mOut[block, thread] = total


class ReadLoop:
    """Every thread reads 16 bytes a step and stores one word of what it read, so that no load is left out."""

    @cute.jit
    def __call__(self, mX: cute.Tensor, mOut: cute.Tensor, stream):
        """mX (steps, blocks, THREADS, 4) int32, mOut (blocks, THREADS) int32."""
        self.kernel(mX, mOut).launch(grid=(mOut.shape[0], 1, 1), block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mOut: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        mixed = Int32(0)
        for step in cutlass.range(mX.shape[0], unroll=IN_FLIGHT):
            words = mX[step, block, thread, None].load()
            mixed = mixed ^ words[0] ^ words[1] ^ words[2] ^ words[3]
        mOut[block, thread] = mixed


def build(kernel: type, target: str, options: str = "") -> Callable:
    """The launcher of MmaLoop or ReadLoop for a target such as "sm_120a"."""
    blocks = cute.sym_int32()

    def out(dtype: type):
        return make_fake_tensor(dtype, (blocks, THREADS), (THREADS, 1), assumed_align=16)

    if kernel is MmaLoop:
        arguments = (out(Float32), Int32(0))
    else:
        stride = (cute.sym_int64(divisibility=4), 4 * THREADS, 4, 1)
        words = make_fake_tensor(Int32, (cute.sym_int32(), blocks, THREADS, 4), stride, assumed_align=16)
        arguments = (words, out(Int32))
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel(), *arguments, stream, options=f"--enable-tvm-ffi --gpu-arch {target} {options}")


@cache
def _launcher(kernel: type) -> Callable:
    return build(kernel, launchers.target(torch.cuda.current_device()))


def _multiprocessors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def mma_tflops() -> float:
    """TFLOPS of mma.sync m16n8k16, bf16 with float32 sums, 16 warps an SM."""
    blocks = BLOCKS_PER_SM * _multiprocessors()
    out = torch.empty(blocks, THREADS, device="cuda")
    ms = median_ms(_launcher(MmaLoop), [(out, ROUNDS)])
    return blocks * (THREADS // 32) * ROUNDS * PRODUCTS * MMA_FLOP / ms / 1e9


def copy_tbps() -> float:
    """TB/s of a device copy, read and write counted."""
    source = torch.empty(BYTES // 4, device="cuda", dtype=torch.int32).fill_(1)
    target = torch.empty_like(source)
    return 2 * BYTES / median_ms(target.copy_, [(source,)]) / 1e9


def read_tbps() -> float:
    """TB/s of reads alone."""
    blocks = READ_BLOCKS_PER_SM * _multiprocessors()
    steps = BYTES // (blocks * THREADS * 16)
    source = torch.ones(steps, blocks, THREADS, 4, device="cuda", dtype=torch.int32)
    out = torch.empty(blocks, THREADS, device="cuda", dtype=torch.int32)
    ms = median_ms(_launcher(ReadLoop), [(source, out)])
    return source.numel() * 4 / ms / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {"device": torch.cuda.get_device_name(), "mma_tflops": mma_tflops()}
    found |= {"copy_tbps": copy_tbps(), "read_tbps": read_tbps()}
    print(f"{found['device']}: mma.sync bf16 {found['mma_tflops']:.0f} TFLOPS, ", end="")
    print(f"copy {found['copy_tbps']:.2f} TB/s, read {found['read_tbps']:.2f} TB/s")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
