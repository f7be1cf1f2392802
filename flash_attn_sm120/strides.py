"""Strides and addresses that a kernel can follow, and what is done about the others."""

from __future__ import annotations

import torch

from flash_attn_sm120.checks import describe, refuse

MAX_ROW_BYTES = 2**31  # the kernels count the bytes from row to row in 31 bits


def has_whole_strides(tensor: torch.Tensor) -> bool:
    """Strides of whole 16 bytes, rows less than 2 GB apart: what a kernel can follow."""
    strides, size = tensor.stride(), tensor.element_size()
    return not any(stride * size % 16 for stride in strides[:-1]) and strides[-3] * size < MAX_ROW_BYTES


def has_tma_strides(tensor: torch.Tensor) -> bool:
    """Whether a tensor map can hold the strides: those of a repeated dimension it can't."""
    return all(stride > 0 or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the kernel can read it, else a copy."""
    view = _readable(tensor)
    return tensor.clone(memory_format=torch.contiguous_format) if view is None else view


def aligned_pool(name: str, pool: torch.Tensor) -> torch.Tensor:
    """As aligned, but a pool is too large to copy."""
    view = _readable(pool)
    if view is None:
        expected = "a pool whose address and strides are multiples of 16 bytes, as it is never copied"
        refuse(name, expected, f"address {pool.data_ptr():#x}, strides {pool.stride()} of {describe(pool)}")
    return view


def _readable(tensor: torch.Tensor) -> torch.Tensor | None:
    if tensor.data_ptr() % 16:
        return None
    if has_whole_strides(tensor):
        return tensor
    # The stride of a dimension of size 1 is never followed, but the launcher looks at it all the same.
    places = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    view = tensor.as_strided(tensor.shape, (*(16 if size == 1 else stride for size, stride in places), 1))
    return view if has_whole_strides(view) else None


def reach(tensor: torch.Tensor) -> int:
    """Bytes from the tensor's address to the end of its last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def target_for(
    out: torch.Tensor, inputs: tuple[torch.Tensor, ...], reaches: tuple[int, ...], writable: bool, keeps_rows: bool
) -> torch.Tensor:
    """out itself, or a temporary where the kernel can't write it directly or would overwrite what it still reads.

    reaches: of the inputs, then of out. keeps_rows: some rows of out are to keep what they hold.
    """
    first = out.data_ptr()
    apart = all(
        tensor.data_ptr() >= first + reaches[-1] or first >= tensor.data_ptr() + own
        for tensor, own in zip(inputs, reaches, strict=False)
    )
    if apart and writable and first % 16 == 0:
        return out.detach() if out.requires_grad else out
    if keeps_rows:
        return out.detach().clone(memory_format=torch.contiguous_format)
    return torch.empty(out.shape, dtype=out.dtype, device=out.device)
