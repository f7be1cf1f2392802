"""Peers of the kernels that read a KV cache: FlashInfer reads the same pages, the others a dense copy of their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flash_attn_sm120.bench import peers

READ_PAGES = ("flashinfer",)
TAKE_WINDOWS = ("flash_attn_4", "flashinfer")
WORKSPACE_BYTES = 256 << 20


def dense_rows(pool: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(num_pages, page_size, heads_kv, d) and (batch, pages) -> (batch, pages * page_size, heads_kv, d)."""
    return pool[table.flatten().long()].reshape(table.shape[0], -1, *pool.shape[2:])


def unable(name: str, window: int | None, kv_dtype: str) -> str:
    """Why a peer can't do a cell, "" if it may."""
    if window is not None and name not in TAKE_WINDOWS:
        return "no windows"
    if kv_dtype and name not in READ_PAGES:
        return "no FP8 K and V"
    return ""


def decode_calls(name: str, sets: list[tuple], seqlen: int, window: int | None) -> tuple[list[Callable], list[tuple]]:
    """(calls that do the same in different ways, inputs of each): one query token a sequence.

    sets: (q, k_pool, v_pool, page_table) with q (batch, 1, heads, d). Each call returns q's shape."""
    if name == "flashinfer":
        return _flashinfer_decode(sets, seqlen, window), [sets_[:3] for sets_ in sets]
    dense = [(q, *(dense_rows(pool, table)[:, :seqlen] for pool in (k, v))) for q, k, v, table in sets]
    grouped = dense[0][0].shape[2] != dense[0][1].shape[2]
    # One query sees every key, which SDPA's causal mask, aligned at the top left, would not say.
    return [peers.peer(name, window is not None, window, grouped)], dense


def _flashinfer_decode(sets: list[tuple], seqlen: int, window: int | None) -> list[Callable]:
    """Its two kernels: of the CUDA cores and of the tensor cores."""
    import flashinfer

    q, k_pool, _, table = sets[0]
    calls = []
    for tensor_cores in (False, True):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(), "NHD", use_tensor_cores=tensor_cores, backend="fa2"
        )
        wrapper.plan(
            *_pages(table, seqlen, k_pool.shape[1]), q.shape[2], k_pool.shape[2], q.shape[3], k_pool.shape[1],
            window_left=-1 if window is None else window, q_data_type=q.dtype, kv_data_type=k_pool.dtype,
        )  # fmt: skip

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Callable = wrapper.run) -> torch.Tensor:
            return run(q[:, 0], (k, v))[:, None]

        calls.append(call)
    return calls


def flashinfer_prefill(shape: tuple[int, ...], pool: torch.Tensor, table: torch.Tensor, causal: bool) -> Callable:
    """call(q, k_pool, v_pool) -> out of a prefill of whole sequences. shape: of q, (batch, seqlen, heads, d)."""
    import flashinfer

    batch, seqlen, heads, head_dim = shape
    marks = torch.arange(batch + 1, device=table.device, dtype=torch.int32) * seqlen
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2")
    wrapper.plan(
        marks, *_pages(table, seqlen, pool.shape[1]), heads, pool.shape[2], head_dim, pool.shape[1],
        causal=causal, q_data_type=torch.bfloat16, kv_data_type=pool.dtype,
    )  # fmt: skip

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return wrapper.run(q.flatten(0, 1), (k, v)).view(q.shape)

    return call


def _pages(table: torch.Tensor, seqlen: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indptr, indices, last_page_len) of sequences of one length, as FlashInfer takes a page table."""
    options: dict[str, Any] = {"device": table.device, "dtype": torch.int32}
    batch, pages = table.shape
    last = torch.full((batch,), seqlen - (pages - 1) * page_size, **options)
    return torch.arange(batch + 1, **options) * pages, table.flatten(), last


def _workspace() -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, device="cuda", dtype=torch.uint8)
