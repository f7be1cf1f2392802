"""Attention forward kernels for NVIDIA SM120 and SM121. Importing the package loads neither torch nor cutlass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_attn_sm120.block_sparse import BlockSparseTensors
    from flash_attn_sm120.combine import flash_attn_combine
    from flash_attn_sm120.dropout import dropout_mask
    from flash_attn_sm120.dual_group import fused_zigzag_llama3_flash_attn_varlen_forward
    from flash_attn_sm120.grouped_attention import replace_execute_grouped_attention_with_fused_varlen
    from flash_attn_sm120.interface import flash_attn_func, flash_attn_varlen_func
    from flash_attn_sm120.problem import AttentionProblem
    from flash_attn_sm120.scheduling import get_scheduler_metadata
    from flash_attn_sm120.shipped import Shapes
    from flash_attn_sm120.warm import warmup

__version__ = "0.1.0"
__all__ = [
    "AttentionProblem",
    "BlockSparseTensors",
    "Shapes",
    "__version__",
    "dropout_mask",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "fused_zigzag_llama3_flash_attn_varlen_forward",
    "get_scheduler_metadata",
    "replace_execute_grouped_attention_with_fused_varlen",
    "warmup",
]

_HOMES = {
    "AttentionProblem": "problem",
    "BlockSparseTensors": "block_sparse",
    "dropout_mask": "dropout",
    "flash_attn_combine": "combine",
    "flash_attn_func": "interface",
    "flash_attn_varlen_func": "interface",
    "fused_zigzag_llama3_flash_attn_varlen_forward": "dual_group",
    "get_scheduler_metadata": "scheduling",
    "replace_execute_grouped_attention_with_fused_varlen": "grouped_attention",
    "Shapes": "shipped",
    "warmup": "warm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
