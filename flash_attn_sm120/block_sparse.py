"""BlockSparseTensors: which blocks of keys each block of queries sees, and how to make the lists.

Source: the lists are those of torch's flex_attention (BlockMask), read by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from flash_attn_sm120 import checks, checks_sparse, launchers
from flash_attn_sm120.arguments import ClassifyArguments, Lengths
from flash_attn_sm120.problem import ClassifyProblem

CHUNK_ELEMENTS = 1 << 24  # of a dense mask that are looked at together


@dataclass(frozen=True, eq=False, slots=True)
class BlockSparseTensors:
    """Blocks of keys that each block of queries sees; all others count as masked, and aren't loaded.

    mask_block_cnt: int32 (batch or 1, heads or 1, m_blocks), how many blocks the mask_mod applies to; heads are those
        of q; 1 serves all.
    mask_block_idx: int32 (batch or 1, heads or 1, m_blocks, n_blocks), their indices, ascending; the rest isn't read.
    full_block_cnt, full_block_idx: likewise, blocks that are seen in full: the mask_mod isn't called. No block is in
        both lists. Each pair may be None, not both.
    block_size: (rows, columns) of a block, or one int for both; rows a multiple of 64, columns a multiple of 32.

    Rows of blocks with no block give out 0 and lse -inf. Causal masks, windows and the ends of sequences apply besides.
    Raises ValueError and TypeError for a wrong block_size; the tensors are checked by the call that takes them.
    """

    mask_block_cnt: torch.Tensor | None
    mask_block_idx: torch.Tensor | None
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    block_size: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", checks_sparse.check_block_size("block_size", self.block_size))

    @classmethod
    def from_block_mask(cls, block_mask: Any) -> BlockSparseTensors:
        """Of a torch.nn.attention.flex_attention.BlockMask; its mask_mod has to be given to the call as well.

        Nothing is copied that is contiguous int32, as create_block_mask makes it. Raises TypeError for another kind,
        ValueError for a BLOCK_SIZE that isn't offered."""
        from torch.nn.attention.flex_attention import BlockMask

        if not isinstance(block_mask, BlockMask):
            expected = "a torch.nn.attention.flex_attention.BlockMask"
            checks.refuse("block_mask", expected, checks.describe(block_mask), TypeError)
        block_size = checks_sparse.check_block_size("block_mask.BLOCK_SIZE", block_mask.BLOCK_SIZE)
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
        given = (getattr(block_mask, name) for name in names)
        lists = [None if tensor is None else tensor.to(torch.int32).contiguous() for tensor in given]
        return cls(lists[0], lists[1], lists[2], lists[3], block_size)

    @classmethod
    def from_dense(cls, mask: torch.Tensor, block_size: int | tuple[int, int] = (128, 128)) -> BlockSparseTensors:
        """Of a mask of every element: blocks all True are full, blocks partly True are masked ones, the rest is absent.

        mask: bool (batch or 1, heads or 1, seqlen_q, seqlen_k), True where a row sees a column; a dimension that is
            expanded counts as 1. Elements beyond its ends don't exist. The call needs it, too, for the masked blocks.
        Takes memory for a chunk of the mask at a time: 64 MB, or four times a row of blocks where that is more.
        Raises TypeError and ValueError for another kind, dtype, shape or block size."""
        checks_sparse.check_mask(mask)
        rows, cols = checks_sparse.check_block_size("block_size", block_size)
        for axis in (0, 1):
            if mask.shape[axis] > 1 and mask.stride(axis) == 0:
                mask = mask.narrow(axis, 0, 1)
        batch, heads, seqlen_q, seqlen_k = mask.shape
        n_blocks = max(1, -(-seqlen_k // cols))
        sizes = (seqlen_k - torch.arange(n_blocks, device=mask.device) * cols).clamp(max=cols)
        step = max(1, CHUNK_ELEMENTS // max(1, batch * heads * rows * n_blocks * cols)) * rows
        some, every = [], []
        for first in range(0, seqlen_q, step):
            part = mask[:, :, first : first + step]
            length = part.shape[2]
            m_blocks = -(-length // rows)
            part = torch.nn.functional.pad(part, (0, n_blocks * cols - seqlen_k, 0, m_blocks * rows - length))
            seen = part.view(batch, heads, m_blocks, rows, n_blocks, cols).sum((3, 5), dtype=torch.int32)
            heights = (length - torch.arange(m_blocks, device=mask.device) * rows).clamp(max=rows)
            some.append(seen > 0)
            every.append(seen == heights[:, None] * sizes)
        if not some:
            some = every = [mask.new_zeros(batch, heads, 0, n_blocks)]
        seen_any = torch.cat(some, 2)
        full = torch.cat(every, 2) & seen_any
        return cls(*_lists(seen_any & ~full), *_lists(full), block_size=(rows, cols))

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: Callable,
        batch: int | None,
        heads: int | None,
        seqlen_q: int,
        seqlen_k: int,
        block_size: int | tuple[int, int] = (128, 128),
        device: torch.device | str = "cuda",
        aux_tensors: Sequence[torch.Tensor] = (),
        aux_scalars: Sequence[int | float] = (),
        *,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        seqused_q: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None,
    ) -> BlockSparseTensors:
        """Of a mask_mod, which one kernel calls for every element; a mask of that size is never stored.

        mask_mod: as flash_attn_func takes it.
        batch, heads: None for one list that serves all; the mask_mod sees index 0 then. Where sequences have lengths
            of their own, batch None is theirs. heads are those of q.
        seqlen_q, seqlen_k: of every sequence, or the most that one has.
        block_size: (rows, columns), or one int for both; rows a multiple of 64, columns a multiple of 32.
        aux_tensors, aux_scalars: what the mask_mod reads.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), seqused_q, seqused_k: int32 (batch,): lengths of each sequence.
            Blocks are counted from each sequence's first row and column; rows of blocks beyond its end have count 0.

        The lists are new tensors on the device, made on PyTorch's current stream; idx beyond cnt is 0.
        Raises ValueError, TypeError and NotImplementedError as flash_attn_func does."""
        from flash_attn_sm120.mod_key import mod_of

        mod = mod_of("mask_mod", mask_mod)
        if mod is None:
            checks.refuse("mask_mod", "a function", "None", TypeError)
        rows, cols = checks_sparse.check_block_size("block_size", block_size)
        seqlen_q = checks_sparse.check_size("seqlen_q", seqlen_q)
        seqlen_k = checks_sparse.check_size("seqlen_k", seqlen_k)
        batch = None if batch is None else checks_sparse.check_size("batch", batch, 1)
        heads = 1 if heads is None else checks_sparse.check_size("heads", heads, 1)
        device = torch.empty(0, device=device).device
        aux = checks_sparse.check_aux(aux_tensors, aux_scalars, device)
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
        given = {name: value for name, value in lengths._asdict().items() if name in checks_sparse.LENGTHS}
        batch = checks_sparse.check_sequence_tensors(given, batch, device)
        if checks.VALUE_CHECKS:
            checks_sparse.check_maxima(given, seqlen_q, seqlen_k)
        shape = (batch, heads, -(-seqlen_q // rows), max(1, -(-seqlen_k // cols)))
        if shape[0] * shape[1] * shape[2] >= 2**31:
            checks.refuse("batch", "fewer than 2^31 rows of blocks in all", f"shape {shape[:3]}")
        flags = [tensor is not None for tensor in given.values()]
        problem = ClassifyProblem(mod, (rows, cols), aux, *flags)
        a, b, c, d = (torch.zeros(shape[:size], dtype=torch.int32, device=device) for size in (3, 4, 3, 4))
        values = (*(tensor.detach() for tensor in aux_tensors), *aux_scalars)
        arguments = ClassifyArguments(a, b, c, d, tuple(lengths), values, seqlen_q, seqlen_k)
        if shape[2] == 0:
            launchers.check_device(device, "device")
        else:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                launchers.load(problem, device, "device")(*arguments)
        return cls(a, b, c, d, (rows, cols))

    def to_dense(self, seqlen_q: int, seqlen_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(visible, needs_mask_mod): bool (batch or 1, heads or 1, seqlen_q, seqlen_k).

        visible: the element's block is in one of the lists. needs_mask_mod: it is in that of masked blocks, so that the
        mask_mod decides. Plain torch, to debug and to compare with; takes the memory of both.
        Raises as check_block_sparse does, for other sizes and forms."""
        counts = [cnt for cnt in (self.mask_block_cnt, self.full_block_cnt) if isinstance(cnt, torch.Tensor)]
        batch, heads = (max((cnt.shape[axis] for cnt in counts if cnt.dim() == 3), default=1) for axis in (0, 1))
        device = counts[0].device if counts else torch.device("cpu")
        checks_sparse.check_block_sparse(self, batch, heads, seqlen_q, seqlen_k, device, exact=False)
        empty = torch.zeros(batch, heads, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
        masked, full = (
            empty if cnt is None or idx is None else empty | _spread(cnt, idx, seqlen_q, seqlen_k, self.block_size)
            for cnt, idx in ((self.mask_block_cnt, self.mask_block_idx), (self.full_block_cnt, self.full_block_idx))
        )
        return masked | full, masked


def _lists(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cnt, idx) of blocks: bool (batch, heads, m_blocks, n_blocks) -> int32; idx beyond cnt is 0."""
    cnt = flags.sum(3, dtype=torch.int32)
    order = flags.to(torch.uint8).argsort(dim=3, descending=True, stable=True).to(torch.int32)
    used = torch.arange(flags.shape[3], device=flags.device) < cnt[..., None]
    return cnt, order * used


def _spread(
    cnt: torch.Tensor, idx: torch.Tensor, seqlen_q: int, seqlen_k: int, block_size: tuple[int, int]
) -> torch.Tensor:
    """bool (batch, heads, seqlen_q, seqlen_k): elements whose blocks a list names."""
    rows, cols = block_size
    n_blocks = -(-seqlen_k // cols)
    used = torch.arange(idx.shape[3], device=idx.device) < cnt[..., None]
    used &= (idx >= 0) & (idx < n_blocks)
    flags = torch.zeros(*idx.shape[:3], n_blocks + 1, dtype=torch.bool, device=idx.device)
    flags.scatter_(3, torch.where(used, idx, n_blocks).long(), True)
    flags = flags[..., :n_blocks].repeat_interleave(rows, 2)[:, :, :seqlen_q]
    return flags.repeat_interleave(cols, 3)[..., :seqlen_k]
