"""Ready-made score_mod and mask_mod functions, each with its twin in PyTorch as the attribute in_torch.

    flash_attn_func(q, k, v, score_mod=mods.alibi(), aux_tensors=[slopes])
    flash_attn_func(q, k, v, mask_mod=mods.both(mods.causal(), mods.document()), aux_tensors=[ids])

Each public function makes a mod; equal arguments make mods that share a compiled kernel.
"""

from .masks import both, causal, dense, dilated, document, either, prefix_lm, sliding_window
from .scores import alibi, relative_bias, softcap

__all__ = [
    "alibi",
    "both",
    "causal",
    "dense",
    "dilated",
    "document",
    "either",
    "prefix_lm",
    "relative_bias",
    "sliding_window",
    "softcap",
]
