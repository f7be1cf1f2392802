"""As many blocks on an SM as SM120 holds, on a GPU with more shared memory: the launch asks for more than it uses."""

from __future__ import annotations

import torch

from flash_attn_sm120.occupancy import RESERVED_BYTES, SHARED_BYTES, SHARED_BYTES_A_BLOCK


def padded_smem(smem_bytes: int, blocks: int) -> int:
    """Dynamic shared memory of a launch, smem_bytes or more, of which no more than `blocks` blocks fit an SM here."""
    shared = torch.cuda.get_device_properties(0).shared_memory_per_multiprocessor
    return max(smem_bytes, (shared // (blocks + 1) - RESERVED_BYTES + 16) // 16 * 16)


def blocks_on_sm120(smem_bytes: int) -> int:
    """Blocks that SM120's shared memory holds. Raises ValueError where it holds none."""
    if smem_bytes > SHARED_BYTES_A_BLOCK:
        raise ValueError(f"smem_bytes: expected at most {SHARED_BYTES_A_BLOCK}, got {smem_bytes}")
    return SHARED_BYTES // (smem_bytes + RESERVED_BYTES)
