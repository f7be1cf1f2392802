"""Masks for tests of block sparsity: as functions that kernels call, and as the dense masks that they stand for."""

import itertools

import torch

from flash_attn_sm120 import BlockSparseTensors

NAMES = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
WILD = 2**31 - 7  # a block number that nobody may follow


def places(seqlen_q, seqlen_k, device="cpu"):
    """Rows (seqlen_q, 1) and columns (1, seqlen_k)."""
    return torch.arange(seqlen_q, device=device)[:, None], torch.arange(seqlen_k, device=device)[None]


def causal(seqlen_q, seqlen_k, device="cpu"):
    q, k = places(seqlen_q, seqlen_k, device)
    return (q + seqlen_k - seqlen_q >= k)[None, None]


def window(seqlen_q, seqlen_k, width, device="cpu"):
    q, k = places(seqlen_q, seqlen_k, device)
    return ((q - k).abs() <= width)[None, None]


def brute_lists(mask, rows, cols):
    """{(batch, head, m_block): (masked blocks, full blocks)} of a dense mask, by looking at each block."""
    batch, heads, seqlen_q, seqlen_k = mask.shape
    found = {}
    for b in range(batch):
        for h in range(heads):
            for m in range(-(-seqlen_q // rows)):
                masked, full = found.setdefault((b, h, m), ([], []))
                for n in range(-(-seqlen_k // cols)):
                    block = mask[b, h, m * rows : (m + 1) * rows, n * cols : (n + 1) * cols]
                    if block.all():
                        full.append(n)
                    elif block.any():
                        masked.append(n)
    return found


def lists_of(sparse):
    """The same of BlockSparseTensors, which have both lists."""
    found = {}
    pairs = (
        (sparse.mask_block_cnt, sparse.mask_block_idx),
        (sparse.full_block_cnt, sparse.full_block_idx),
    )
    for cnt, idx in pairs:
        for b in range(cnt.shape[0]):
            for h in range(cnt.shape[1]):
                for m in range(cnt.shape[2]):
                    found.setdefault((b, h, m), []).append(idx[b, h, m, : cnt[b, h, m]].tolist())
    return {place: tuple(lists) for place, lists in found.items()}


def random_blocks(batch, heads, seqlen_q, seqlen_k, block_size, density, kinds=("mask", "full"), device="cpu"):
    """BlockSparseTensors that name this share of blocks, each in a list of `kinds` at random, absent lists None."""
    shape = (batch, heads, -(-seqlen_q // block_size[0]), max(1, -(-seqlen_k // block_size[1])))
    named = torch.rand(shape, device=device) < density
    chosen = torch.randint(len(kinds), shape, device=device)
    lists = {}
    for i, kind in enumerate(kinds):
        cnt, idx = lists_from(named & (chosen == i))
        lists |= {f"{kind}_block_cnt": cnt, f"{kind}_block_idx": idx}
    return BlockSparseTensors(**{**dict.fromkeys(NAMES), **lists}, block_size=block_size)


def lists_from(flags):
    """(cnt, idx) of blocks: bool (batch, heads, m_blocks, n_blocks); what lies beyond a count is wild."""
    cnt = flags.sum(3, dtype=torch.int32)
    idx = torch.full(flags.shape, WILD, dtype=torch.int32, device=flags.device)
    for b, h, m in itertools.product(*map(range, flags.shape[:3])):
        idx[b, h, m, : cnt[b, h, m]] = flags[b, h, m].nonzero()[:, 0].int()
    return cnt, idx
