"""Other attention kernels as call(q, k, v) -> out: PyTorch's SDPA, and flash-attn-4's sm_120 kernel if installed."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sm120_mode import blocks_on_sm120, padded_smem
from torch.nn.attention import SDPBackend, sdpa_kernel

TITLES = {
    "sdpa_flash": "SDPA flash",
    "flash_attn_4": "flash-attn-4",
    "flash_attn_4_sm120": "flash-attn-4, SM120 mode",
    "sdpa_cudnn": "SDPA cuDNN",
}
MMA_SYNC = ("sdpa_flash", "flash_attn_4", "flash_attn_4_sm120")  # cuDNN may use what SM120 lacks
TAKE_WINDOWS = ("flash_attn_4", "flash_attn_4_sm120")

_padded_kernels: dict = {}


def peer(name: str, causal: bool, window: int | None, grouped: bool) -> Callable:
    """window: columns left of the diagonal, None for all. grouped: fewer KV heads than query heads."""
    if name == "sdpa_flash":
        return _sdpa(SDPBackend.FLASH_ATTENTION, causal, grouped)
    if name == "sdpa_cudnn":
        return _sdpa(SDPBackend.CUDNN_ATTENTION, causal, grouped)
    return _flash_attn_4(causal, window, as_on_sm120=name == "flash_attn_4_sm120")


def _sdpa(backend: SDPBackend, causal: bool, grouped: bool) -> Callable:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

    return call


def _flash_attn_4(causal: bool, window: int | None, as_on_sm120: bool) -> Callable:
    os.environ.setdefault("FLASH_ATTENTION_ARCH", "sm_120")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    os.environ.setdefault("FLASH_ATTENTION_NUM_SMS", str(sms))
    from flash_attn.cute import flash_attn_func

    sides = (None, None) if window is None else (window, 0)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = flash_attn_func(q, k, v, causal=causal, window_size=sides)
        return out[0] if isinstance(out, tuple) else out

    return _as_on_sm120(call) if as_on_sm120 else call


def _as_on_sm120(call: Callable) -> Callable:
    """The same call with kernels of its own, compiled with the shared memory of their launches padded."""
    from flash_attn.cute import interface
    from flash_attn.cute.flash_fwd_sm120 import FlashAttentionForwardSm120 as Kernel

    plain_storage, plain_kernels = Kernel._get_shared_storage_cls, interface._flash_attn_fwd.compile_cache

    def padded_storage(kernel: Kernel):
        storage = plain_storage(kernel)
        size = storage.size_in_bytes()
        padded = padded_smem(size, blocks_on_sm120(size))
        storage.size_in_bytes = lambda: padded  # of which the launch asks; the layout stays
        return storage

    def padded_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        Kernel._get_shared_storage_cls, interface._flash_attn_fwd.compile_cache = padded_storage, _padded_kernels
        try:
            return call(q, k, v)
        finally:
            Kernel._get_shared_storage_cls, interface._flash_attn_fwd.compile_cache = plain_storage, plain_kernels

    return padded_call
