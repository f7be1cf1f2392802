"""Numbers and types that several parts share."""

from __future__ import annotations

import numpy as np

# The program counter of a lane that has ended: behind every block.
EXIT = 1 << 30
# A batch takes some thousands of blocks; one that takes more than this spins on something that nobody will change.
MAX_BLOCKS = 2_000_000
# Where a CTA's shared memory begins: the first KB belongs to the system.
SHARED_START = 1024
# Windows of the generic address space that stand for shared memory and for the parameter block.
SHARED_WINDOW = 1 << 56
PARAM_WINDOW = 1 << 57
# The bits of a float64 that a float32 has: to keep these alone is truncation towards zero.
FLOAT32_BITS = np.int64(-1 << 29)

# What a register of a declared width holds, and how an instruction's type reads it; bf16 and pairs come as their bits.
BASE_TYPES = {"pred": np.bool_, "8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
TYPES = {
    "pred": np.dtype(np.bool_),
    **{f"{kind}{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64) for kind in "ub"},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
}
