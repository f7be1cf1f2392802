"""Other attention kernels as call(q, k, v) -> out: PyTorch's SDPA, and flash-attn-4's sm_120 kernel if installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_sm120.bench.sm120_mode import blocks_on_sm120, padded_smem
from flash_attn_sm120.bench.tables import DENSE

TITLES = DENSE
MMA_SYNC = ("sdpa_flash", "flash_attn_4", "flash_attn_4_sm120")  # cuDNN may use what SM120 lacks
TAKE_WINDOWS = ("flash_attn_4", "flash_attn_4_sm120")

PACKAGES = {  # (what is imported, what is installed) of the peers that don't come with PyTorch
    "flash_attn_4": ("flash_attn.cute", "flash-attn-4"),
    "flash_attn_4_sm120": ("flash_attn.cute", "flash-attn-4"),
    "flashinfer": ("flashinfer", "flashinfer-python"),
}

_padded_kernels: dict = {}


class NotOffered(Exception):
    """A peer doesn't do this; the message says what, in a word or two."""


class Differs(Exception):
    """A peer's result isn't ours; the message says by how much."""


def reason(error: Exception) -> str:
    """What a table shows up to the first colon, and the whole message behind it."""
    if isinstance(error, NotOffered):
        return str(error)
    if isinstance(error, Differs):
        return f"differs by {error}"
    kind = "not installed" if isinstance(error, ImportError) else type(error).__name__
    return f"{kind}: {error}"


def installed(name: str) -> bool:
    """Whether a peer can be imported, without importing all of it."""
    if name not in PACKAGES:
        return True
    try:
        return find_spec(PACKAGES[name][0]) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


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
