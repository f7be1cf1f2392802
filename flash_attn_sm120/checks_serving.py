"""What the public functions refuse of pages, splits, scales, sinks, slopes, chunks and ranks; as checks.py says it."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch

from flash_attn_sm120.checks import FLOAT32, UNBOUNDED, describe, refuse
from flash_attn_sm120.dispatch import MAX_SPLITS


def one_of(name: str, value: Any, alias: str, other: Any) -> Any:
    """The argument that is given under one of two names."""
    if value is not None and other is not None:
        refuse(alias, f"None beside {name}, which is the same argument", describe(other))
    return other if value is None else value


def check_pool(k: torch.Tensor, cu_seqlens_k: Any, seqused_k: Any) -> None:
    """k, whose shape v has but for head_dim_v, as a pool of pages."""
    if cu_seqlens_k is not None:
        refuse("cu_seqlens_k", "None beside page_table (seqused_k gives the lengths)", describe(cu_seqlens_k))
    if seqused_k is None:
        refuse("seqused_k", "int32 of shape (batch,) beside page_table", "None")
    if k.shape[0] == 0:
        refuse("k", "at least one page", describe(k))
    if k.shape[1] % 8 or k.shape[1] == 0:
        refuse("k", "a page_size (k.shape[1]) that is a multiple of 8", f"{k.shape[1]} ({describe(k)})")


def check_page_table(page_table: Any, batch: int, device: torch.device) -> None:
    """Reads no values."""
    expected = "int32 of shape (batch, pages)"
    if not isinstance(page_table, torch.Tensor) or page_table.dtype != torch.int32:
        refuse("page_table", expected, describe(page_table), TypeError)
    if page_table.dim() != 2:
        refuse("page_table", expected, describe(page_table))
    if page_table.device != device:
        refuse("page_table", f"a tensor on {device} as q", describe(page_table))
    if page_table.shape[0] != batch:
        refuse("page_table", f"a batch of {batch} as q", f"{page_table.shape[0]} ({describe(page_table)})")
    if page_table.stride(1) != 1:
        refuse("page_table", "a last dimension of stride 1", f"strides {page_table.stride()}")


def check_float8(k: torch.Tensor, v: torch.Tensor) -> None:
    """Rows of k and v in bytes are whole 16 bytes, the unit in which they are loaded."""
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[-1] % 16:
            expected = "a head_dim that is a multiple of 16 in float8"
            refuse(name, expected, f"{tensor.shape[-1]} ({describe(tensor)})", NotImplementedError)


def check_q_descale(value: Any) -> None:
    if value is not None and not (isinstance(value, (int, float)) and value == 1):
        refuse("q_descale", "None or 1 (q isn't float8)", describe(value), NotImplementedError)


def check_descale(name: str, value: Any, batch: int, heads_kv: int, device: torch.device) -> float | None:
    """The number, if it is one; None where nothing or a tensor is given."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        expected = f"float32 of shape {(batch, heads_kv)} (batch, heads_kv), (1,) or ()"
        if value.dtype != torch.float32:
            refuse(name, expected, describe(value), TypeError)
        if value.shape not in ((batch, heads_kv), (1,), ()):
            refuse(name, expected, describe(value))
        if value.device != device:
            refuse(name, f"a tensor on {device} as q", describe(value))
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        refuse(name, "a number or a float32 tensor", describe(value), TypeError)
    if not FLOAT32.tiny <= float(value) <= FLOAT32.max:
        refuse(name, "a finite number > 0", value)
    return float(value)


def check_scaled(softmax_scale: float, k_descale: float | None) -> float:
    """softmax_scale with a k_descale that is a number in it."""
    if k_descale is None:
        return softmax_scale
    scale = softmax_scale * k_descale
    if not FLOAT32.tiny <= scale <= FLOAT32.max:
        refuse("k_descale", "a number whose product with softmax_scale float32 holds", f"{softmax_scale} * {k_descale}")
    return scale


def check_sink(value: Any, heads: int, device: torch.device) -> None:
    if value is None:
        return
    expected = f"bfloat16 or float32 of shape ({heads},), a value a head of q"
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.bfloat16, torch.float32):
        refuse("learnable_sink", expected, describe(value), TypeError)
    if value.shape != (heads,):
        refuse("learnable_sink", expected, describe(value))
    if value.device != device:
        refuse("learnable_sink", f"a tensor on {device}", describe(value))


def check_alibi(value: Any, batch: int, heads: int, device: torch.device) -> None:
    if value is None:
        return
    expected = f"float32 of shape ({heads},) or {(batch, heads)}, a slope a head of q"
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        refuse("alibi_slopes", expected, describe(value), TypeError)
    if value.shape not in ((heads,), (batch, heads)):
        refuse("alibi_slopes", expected, describe(value))
    if value.device != device:
        refuse("alibi_slopes", f"a tensor on {device} as q", describe(value))


def check_num_splits(value: Any) -> int:
    """0 to choose, 1 for none."""
    value = _whole("num_splits", value, 0)
    if not 0 <= value <= MAX_SPLITS:
        refuse("num_splits", f"an int from 0 (choose) to {MAX_SPLITS}", value)
    return value


def check_attention_chunk(value: Any) -> int:
    value = _whole("attention_chunk", value, 0)
    if value < 0:
        refuse("attention_chunk", "an int >= 0, 0 for none", value)
    return min(value, UNBOUNDED)


def check_context_parallel(
    world_size: Any, rank: Any, tot_seqused_k: Any, batch: int, device: torch.device
) -> tuple[int, int]:
    """(cp_world_size, cp_rank); cp_tot_seqused_k is given exactly where there is more than one rank."""
    world_size, rank = _whole("cp_world_size", world_size, 1), _whole("cp_rank", rank, 0)
    if not 1 <= world_size < UNBOUNDED:
        refuse("cp_world_size", "an int >= 1", world_size)
    if not 0 <= rank < world_size:
        refuse("cp_rank", f"an int from 0 to cp_world_size - 1 = {world_size - 1}", rank)
    expected = "int32 of shape (batch,), the keys of each sequence on all ranks, where cp_world_size > 1"
    if world_size == 1:
        if tot_seqused_k is not None:
            refuse("cp_tot_seqused_k", "None where cp_world_size is 1", describe(tot_seqused_k))
        return 1, 0
    if tot_seqused_k is None:
        refuse("cp_tot_seqused_k", expected, "None")
    if not isinstance(tot_seqused_k, torch.Tensor) or tot_seqused_k.dtype != torch.int32:
        refuse("cp_tot_seqused_k", expected, describe(tot_seqused_k), TypeError)
    if tot_seqused_k.shape != (batch,):
        refuse("cp_tot_seqused_k", f"int32 of shape ({batch},)", describe(tot_seqused_k))
    if tot_seqused_k.device != device:
        refuse("cp_tot_seqused_k", f"a tensor on {device} as q", describe(tot_seqused_k))
    if tot_seqused_k.stride(0) != 1:
        refuse("cp_tot_seqused_k", "a contiguous tensor", f"strides {tot_seqused_k.stride()}")
    return world_size, rank


def _whole(name: str, value: Any, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, (bool, torch.Tensor)):
        refuse(name, "int", describe(value), TypeError)
    try:
        return operator.index(value)
    except TypeError:
        refuse(name, "int", describe(value), TypeError)


def check_page_values(page_table: torch.Tensor, seqused_k: torch.Tensor, num_pages: int, page_size: int) -> None:
    """That the pages within the length of every sequence are in the pool, read back from the device."""
    for batch, (length, row) in enumerate(zip(seqused_k.tolist(), page_table.tolist(), strict=True)):
        for position, page in enumerate(row[: -(-length // page_size)]):
            if not 0 <= page < num_pages:
                refuse("page_table", f"from 0 to {num_pages - 1} at batch {batch}, position {position}", page)


def check_descale_values(name: str, value: torch.Tensor) -> None:
    """Positive and finite, read back from the device: the kernels find a row's maximum before they scale."""
    if not bool(((value > 0) & value.isfinite()).all()):
        refuse(name, "finite numbers > 0", value.tolist())


def check_rank_values(seqused_k: torch.Tensor, tot_seqused_k: torch.Tensor, world_size: int, rank: int) -> None:
    """That every rank's share of a sequence is what interleaving by token gives it, read back from the device."""
    for batch, (own, total) in enumerate(zip(seqused_k.tolist(), tot_seqused_k.tolist(), strict=True)):
        share = len(range(rank, total, world_size))
        if total < 0 or own != share:
            expected = f"{share} for sequence {batch}, the share of rank {rank} of {world_size} in {total} keys"
            refuse("seqused_k", expected, own)
