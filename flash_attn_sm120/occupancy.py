"""How many blocks of a kernel an SM of compute capability 12.x holds. Source: CUDA C++ Programming Guide."""

from __future__ import annotations

from dataclasses import dataclass

SHARED_BYTES = 100 << 10
SHARED_BYTES_A_BLOCK = 99 << 10
RESERVED_BYTES = 1 << 10  # of shared memory, for each block
REGISTERS = 64 << 10
REGISTER_UNIT = 256  # registers are given to warps in units of this many
WARPS = 48
BLOCKS = 24
SUB_PARTITIONS = 4


@dataclass(frozen=True, slots=True)
class Occupancy:
    """blocks resident on one SM; matrix_warps, those of them that issue mma.sync; limit, what keeps it from more."""

    blocks: int
    matrix_warps: int
    limit: str

    @property
    def warps_a_sub_partition(self) -> float:
        return self.matrix_warps / SUB_PARTITIONS


def occupancy(registers: int, num_warps: int, shared_bytes: int, matrix_warps: int | None = None) -> Occupancy:
    """registers a thread; num_warps and shared_bytes (dynamic and static, less the reserved KB) a block.

    matrix_warps: how many of the warps multiply; all if None.
    """
    warp_registers = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    # A warp's registers come from its own sub-partition, so warps are counted there first.
    register_warps = REGISTERS // SUB_PARTITIONS // max(warp_registers, 1) * SUB_PARTITIONS
    limits = {
        "registers": register_warps // num_warps,
        "shared memory": SHARED_BYTES // (shared_bytes + RESERVED_BYTES) if shared_bytes <= SHARED_BYTES_A_BLOCK else 0,
        "warps": WARPS // num_warps,
        "blocks": BLOCKS,
    }
    limit = min(limits, key=limits.__getitem__)
    blocks = limits[limit]
    return Occupancy(blocks, blocks * (num_warps if matrix_warps is None else matrix_warps), limit)
