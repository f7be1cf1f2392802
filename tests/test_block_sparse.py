"""BlockSparseTensors: lists of dense masks and of torch's BlockMask against looking at every block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import brute_lists, causal, lists_of, places, window
from torch.nn.attention.flex_attention import create_block_mask

from flash_attn_sm120 import BlockSparseTensors, block_sparse, checks_sparse


def patchy(generator, batch, heads, seqlen_q, seqlen_k, rows, cols):
    """A dense mask of empty, full and mixed blocks."""
    shape = (batch, heads, -(-seqlen_q // rows), -(-seqlen_k // cols))
    kinds = torch.randint(0, 4, shape, generator=generator)
    kinds = kinds.repeat_interleave(rows, 2)[:, :, :seqlen_q].repeat_interleave(cols, 3)[..., :seqlen_k]
    noise = torch.rand(kinds.shape, generator=generator)
    return torch.where(kinds == 0, False, torch.where(kinds == 1, True, noise < torch.where(kinds == 2, 0.002, 0.998)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 2), st.integers(1, 2), st.integers(1, 300), st.integers(1, 200),
    st.sampled_from([(64, 32), (128, 96), (64, 128)]), st.booleans(),
)  # fmt: skip
def test_dense_masks_of_any_length(seed, batch, heads, seqlen_q, seqlen_k, block_size, in_chunks):
    generator = torch.Generator().manual_seed(seed)
    mask = patchy(generator, batch, heads, seqlen_q, seqlen_k, *block_size)
    with pytest.MonkeyPatch.context() as patch:
        if in_chunks:
            patch.setattr(block_sparse, "CHUNK_ELEMENTS", 2 * block_size[0] * seqlen_k)
        sparse = BlockSparseTensors.from_dense(mask, block_size)
    assert lists_of(sparse) == brute_lists(mask, *block_size)
    checks_sparse.check_block_sparse(sparse, batch, heads, seqlen_q, seqlen_k, mask.device, exact=True)
    checks_sparse.check_block_sparse_values(sparse, seqlen_k)
    visible, needs_mask_mod = sparse.to_dense(seqlen_q, seqlen_k)
    assert torch.equal(visible & (mask | ~needs_mask_mod), mask)


def test_what_lies_beyond_a_count_is_zero():
    sparse = BlockSparseTensors.from_dense(causal(256, 256))
    assert sparse.mask_block_idx.tolist() == [[[[0, 0], [1, 0]]]]
    assert sparse.full_block_idx.tolist() == [[[[0, 0], [0, 0]]]]
    assert sparse.full_block_cnt.tolist() == [[[0, 1]]]
    assert all(getattr(sparse, name).dtype == torch.int32 for name in ("mask_block_cnt", "full_block_idx"))


def test_one_list_serves_a_mask_that_is_expanded():
    sparse = BlockSparseTensors.from_dense(causal(200, 200).expand(3, 5, -1, -1), 64)
    assert sparse.mask_block_cnt.shape == (1, 1, 4) and sparse.full_block_idx.shape == (1, 1, 4, 4)
    assert sparse.block_size == (64, 64)


def test_heads_and_batches_differ():
    mask = torch.zeros(2, 2, 64, 64, dtype=torch.bool)
    mask[0, 1], mask[1, 0, 3, 5] = True, True
    found = lists_of(BlockSparseTensors.from_dense(mask, (64, 64)))
    assert found == {(0, 0, 0): ([], []), (0, 1, 0): ([], [0]), (1, 0, 0): ([0], []), (1, 1, 0): ([], [])}


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 100), (100, 0), (0, 0)])
def test_nothing_to_see(seqlen_q, seqlen_k):
    sparse = BlockSparseTensors.from_dense(torch.ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool))
    assert sparse.mask_block_cnt.shape == (1, 1, -(-seqlen_q // 128)) and sparse.mask_block_idx.shape[3] == 1
    assert int(sparse.mask_block_cnt.sum()) == int(sparse.full_block_cnt.sum()) == 0
    assert sparse.to_dense(seqlen_q, seqlen_k)[0].shape == (1, 1, seqlen_q, seqlen_k)


def document(ids):
    return lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (q >= k)


IDS = (torch.arange(300)[None] // torch.tensor([70, 130])[:, None]).contiguous()
FLEX = {
    "causal": (lambda b, h, q, k: q >= k, None, 300, 300, lambda: causal(300, 300)),
    "window": (lambda b, h, q, k: (q - k).abs() <= 40, None, 300, 500, lambda: window(300, 500, 40)),
    "document": (
        document(IDS), 2, 300, 300, lambda: (IDS[:, :, None] == IDS[:, None])[:, None] & causal(300, 300),
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [(128, 128), (64, 32)], ids=str)
@pytest.mark.parametrize("name", FLEX)
def test_block_mask_of_flex_attention(name, size):
    mask_mod, batch, seqlen_q, seqlen_k, dense = FLEX[name]
    block_mask = create_block_mask(mask_mod, batch, None, seqlen_q, seqlen_k, device="cpu", BLOCK_SIZE=size)
    sparse = BlockSparseTensors.from_block_mask(block_mask)
    assert sparse.block_size == size
    checks_sparse.check_block_sparse(sparse, batch or 1, 1, seqlen_q, seqlen_k, torch.device("cpu"), exact=True)
    checks_sparse.check_block_sparse_values(sparse, seqlen_k)
    visible, needs_mask_mod = sparse.to_dense(seqlen_q, seqlen_k)
    q, k = places(seqlen_q, seqlen_k)
    called = torch.stack([mask_mod(torch.tensor(b), torch.tensor(0), q, k) for b in range(batch or 1)])[:, None]
    assert torch.equal(visible & (called | ~needs_mask_mod), dense())


def test_block_mask_is_not_copied():
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, device="cpu")
    sparse = BlockSparseTensors.from_block_mask(block_mask)
    pairs = (
        (sparse.mask_block_cnt, block_mask.kv_num_blocks), (sparse.mask_block_idx, block_mask.kv_indices),
        (sparse.full_block_cnt, block_mask.full_kv_num_blocks), (sparse.full_block_idx, block_mask.full_kv_indices),
    )  # fmt: skip
    assert all(own.data_ptr() == given.data_ptr() for own, given in pairs)


def test_block_mask_without_full_blocks():
    block_mask = create_block_mask(
        lambda b, h, q, k: q >= k, None, None, 256, 256, device="cpu", separate_full_blocks=False
    )
    sparse = BlockSparseTensors.from_block_mask(block_mask)
    assert sparse.full_block_cnt is None and sparse.full_block_idx is None
    visible, needs_mask_mod = sparse.to_dense(256, 256)
    assert torch.equal(visible, needs_mask_mod) and torch.equal(visible & causal(256, 256), causal(256, 256))


def test_only_full_blocks_and_a_short_list():
    cnt = torch.tensor([[[1, 1]]], dtype=torch.int32)
    idx = torch.tensor([[[[2], [0]]]], dtype=torch.int32)
    sparse = BlockSparseTensors(None, None, cnt, idx, block_size=(64, 32))
    checks_sparse.check_block_sparse(sparse, 4, 2, 100, 90, cnt.device, exact=True)
    checks_sparse.check_block_sparse_values(sparse, 90)
    visible, needs_mask_mod = sparse.to_dense(100, 90)
    assert not needs_mask_mod.any()
    assert visible[0, 0, :64, 64:].all() and visible[0, 0, 64:, :32].all()
    assert int(visible.sum()) == 64 * 26 + 36 * 32


def test_to_dense_broadcasts_lists_of_different_batches():
    cnt = torch.tensor([[[1]], [[0]]], dtype=torch.int32)
    idx = torch.zeros(2, 1, 1, 2, dtype=torch.int32)
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    sparse = BlockSparseTensors(cnt, idx, one, torch.ones(1, 1, 1, 1, dtype=torch.int32), 64)
    visible, needs_mask_mod = sparse.to_dense(1, 128)
    assert visible[0].all() and not visible[1, ..., :64].any() and visible[1, ..., 64:].all()
    assert needs_mask_mod[0, ..., :64].all() and not needs_mask_mod[0, ..., 64:].any() and not needs_mask_mod[1].any()
