"""The kernel that sorts the blocks of a mask_mod, against the lists of the dense mask that it stands for."""

import cutlass
import pytest
import torch
from cutlass import Boolean, cute
from sparse_cases import brute_lists, causal, lists_of, places, window

from flash_attn_sm120 import BlockSparseTensors, cubin
from flash_attn_sm120 import compile as compiler
from flash_attn_sm120.device.mods import vector
from flash_attn_sm120.occupancy import RESERVED_BYTES
from flash_attn_sm120.problem import ClassifyProblem, Mod


def causal_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q >= kv_idx


def causal_by_four(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q >= kv_idx


causal_by_four.__vec_size__ = 4


def window_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return (q_idx - kv_idx <= aux_tensors[0]) & (kv_idx - q_idx <= aux_tensors[0])


def document_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    ids = aux_tensors[0]
    return ids[batch[0], q_idx[0]] == ids[batch[0], kv_idx[0]]


def packed_document_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    ids_q, ids_k = aux_tensors
    return ids_q[seqlen_info.offset_q + q_idx[0]] == ids_k[seqlen_info.offset_k + kv_idx[0]]


def from_the_first_column(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    """Reads only the first column of a vector: what it says of those beyond the end, or the block, mustn't count."""
    return vector([kv_idx[0] + i < aux_tensors[0] for i in range(3)], Boolean)


from_the_first_column.__vec_size__ = 3


def dense_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    mask = aux_tensors[0]
    return vector([mask[batch[0], head[0], q_idx[0], kv_idx[i]] for i in range(2)], Boolean)


dense_mod.__vec_size__ = 2


@cute.jit
def branching_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    seen = kv_idx[0] < 40
    if head[0] > 0:
        seen = q_idx[0] < 70
    return Boolean(seen)


def everything(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return True


def nothing(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return kv_idx < 0


def same(sparse, mask, block_size):
    """The lists of the kernel are those of the mask, and nothing is written behind them."""
    assert lists_of(sparse) == brute_lists(mask, *block_size)
    for cnt, idx in ((sparse.mask_block_cnt, sparse.mask_block_idx), (sparse.full_block_cnt, sparse.full_block_idx)):
        assert not idx[torch.arange(idx.shape[3], device=idx.device) >= cnt[..., None]].any()


SIZES = [(128, 128), (64, 32), (64, 96)]


@pytest.mark.parametrize("block_size", SIZES, ids=str)
@pytest.mark.parametrize("mask_mod", [causal_mod, causal_by_four], ids=["one", "four"])
def test_causal(mask_mod, block_size, device):
    for seqlen_q, seqlen_k in device.pick([(1000, 1500), (77, 333), (128, 1)], [(130, 333), (77, 1)]):
        sparse = BlockSparseTensors.from_mask_mod(
            mask_mod, None, None, seqlen_q, seqlen_k, block_size, device.torch_device
        )
        same(sparse, causal(seqlen_q, seqlen_k), block_size)


@pytest.mark.parametrize("block_size", SIZES, ids=str)
@pytest.mark.parametrize("width", [0, 50, 200])
def test_window_of_a_scalar(width, block_size, device):
    """Many blocks of columns: the warps take several turns."""
    rows, cols = device.pick((500, 3000), (65, 300))
    sparse = BlockSparseTensors.from_mask_mod(
        window_mod, None, None, rows, cols, block_size, device.torch_device, aux_scalars=(width,)
    )
    same(sparse, window(rows, cols, width), block_size)


@pytest.mark.parametrize("mask_mod, value", [(everything, True), (nothing, False)], ids=["everything", "nothing"])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(64, 32), (65, 33), (1, 300)])
def test_one_value(mask_mod, value, seqlen_q, seqlen_k, device):
    sparse = BlockSparseTensors.from_mask_mod(mask_mod, 2, 3, seqlen_q, seqlen_k, (64, 32), device.torch_device)
    same(sparse, torch.full((2, 3, seqlen_q, seqlen_k), value), (64, 32))


def test_more_blocks_than_two_turns_take(device):
    """9, 17 and 25 blocks of columns: one more than 1, 2 and 3 turns of eight warps."""
    for blocks in (9, 17, 25):
        sparse = BlockSparseTensors.from_mask_mod(
            window_mod, None, None, 64, 32 * blocks, (64, 32), device.torch_device, aux_scalars=(32 * blocks - 60,)
        )
        same(sparse, window(64, 32 * blocks, 32 * blocks - 60), (64, 32))


def test_documents_of_an_aux_tensor(device):
    ids = (torch.arange(200)[None] // torch.tensor([64, 90])[:, None]).to(torch.int32).to(device.torch_device)
    sparse = BlockSparseTensors.from_mask_mod(document_mod, 2, 3, 200, 200, 64, device.torch_device, [ids])
    mask = (ids[:, :, None] == ids[:, None])[:, None].expand(2, 3, -1, -1)
    same(sparse, mask, (64, 64))


def test_dense_mask_in_vectors_of_two_with_ragged_ends(device):
    mask = (torch.rand(2, 2, 70, 101, device=device.torch_device) < 0.999).transpose(2, 3).contiguous().transpose(2, 3)
    sparse = BlockSparseTensors.from_mask_mod(dense_mod, 2, 2, 70, 101, (64, 32), device.torch_device, [mask])
    same(sparse, mask, (64, 32))
    dense = BlockSparseTensors.from_dense(mask, (64, 32))
    assert lists_of(dense) == lists_of(sparse)
    assert torch.equal(dense.mask_block_idx, sparse.mask_block_idx)


@pytest.mark.parametrize("seen", [32, 64, 100])
def test_vectors_that_reach_beyond_a_block(seen, device):
    sparse = BlockSparseTensors.from_mask_mod(
        from_the_first_column, None, None, 70, 100, (64, 32), device.torch_device, aux_scalars=[seen]
    )
    same(sparse, (places(70, 100)[1] < seen).expand(1, 1, 70, 100), (64, 32))


@pytest.mark.parametrize("row, col", [(0, 0), (63, 31), (64, 32), (69, 100), (5, 100), (69, 0)])
@pytest.mark.parametrize("value", [True, False])
def test_one_element_that_differs(row, col, value, device):
    mask = torch.full((1, 1, 70, 101), not value, device=device.torch_device)
    mask[..., row, col] = value
    sparse = BlockSparseTensors.from_mask_mod(dense_mod, None, None, 70, 101, (64, 32), device.torch_device, [mask])
    same(sparse, mask, (64, 32))


def test_a_mod_with_branches_sees_its_head(device):
    q, k = places(100, 100)
    mask = torch.stack([(k < 40).expand(100, 100), (q < 70).expand(100, 100)])[None]
    sparse = BlockSparseTensors.from_mask_mod(branching_mod, None, 2, 100, 100, (64, 64), device.torch_device)
    same(sparse, mask, (64, 64))


def expected_varlen(lengths_q, lengths_k, mask_of, m_blocks, rows, cols):
    """Lists of sequences: their own, and none beyond their ends."""
    found = {}
    for b, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        found |= {(b, 0, m): ([], []) for m in range(m_blocks)}
        own = brute_lists(mask_of(b, length_q, length_k), rows, cols)
        found |= {(b, 0, m): lists for (_, _, m), lists in own.items()}
    return found


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device.torch_device)


def marks(lengths, device):
    return torch.nn.functional.pad(ints(lengths, device).cumsum(0, dtype=torch.int32), (1, 0))


def test_packed_sequences(device):
    lengths_q, lengths_k = [100, 0, 1, 64], [130, 40, 0, 33]
    sparse = BlockSparseTensors.from_mask_mod(
        causal_mod, None, None, 130, 130, (64, 32), device.torch_device,
        cu_seqlens_q=marks(lengths_q, device), cu_seqlens_k=marks(lengths_k, device),
    )  # fmt: skip
    assert sparse.mask_block_idx.shape == (4, 1, 3, 5)
    found = expected_varlen(lengths_q, lengths_k, lambda b, q, k: causal(q, k), 3, 64, 32)
    assert lists_of(sparse) == found


def test_packed_sequences_of_which_a_part_is_used(device):
    used_q, used_k = [70, 20], [129, 64]
    sparse = BlockSparseTensors.from_mask_mod(
        causal_mod, 2, None, 130, 130, (64, 32), device.torch_device, seqused_q=ints(used_q, device),
        cu_seqlens_q=marks([100, 64], device), seqused_k=ints(used_k, device),
    )  # fmt: skip
    assert lists_of(sparse) == expected_varlen(used_q, used_k, lambda b, q, k: causal(q, k), 3, 64, 32)


def test_packed_aux_tensors_are_read_from_a_sequences_first_row(device):
    lengths_q, lengths_k = [70, 130], [40, 100]
    starts = [(0, 0), (70, 40)]
    ids_q, ids_k = ints([i // 64 for i in range(200)], device), ints([i // 50 for i in range(140)], device)
    sparse = BlockSparseTensors.from_mask_mod(
        packed_document_mod, 2, 1, 130, 100, 64, device.torch_device, (ids_q, ids_k),
        cu_seqlens_q=marks(lengths_q, device), cu_seqlens_k=marks(lengths_k, device),
    )  # fmt: skip

    def mask_of(b, q, k):
        first_q, first_k = starts[b]
        return (ids_q[first_q : first_q + q, None] == ids_k[None, first_k : first_k + k])[None, None]

    assert lists_of(sparse) == expected_varlen(lengths_q, lengths_k, mask_of, 3, 64, 64)


def test_no_queries_launch_nothing(recorder):
    sparse = BlockSparseTensors.from_mask_mod(causal_mod, 2, None, 0, 100, 64, "cpu")
    assert sparse.mask_block_cnt.shape == (2, 1, 0) and not recorder.problems


def test_what_is_launched(recorder):
    """The problem holds what selects code, the arguments the rest; a function that is the same compiles once."""
    aux, used = torch.zeros(3, 4, dtype=torch.bool), torch.tensor([5, 6, 7], dtype=torch.int32)
    for length in (300, 400):
        BlockSparseTensors.from_mask_mod(
            window_mod, 3, 2, 200, length, (64, 32), "cpu", [aux], [7, 0.5], seqused_k=used
        )
    first, second = recorder.problems
    assert first == second
    assert first.aux == (("bool", 2), "int32", "float32") and first.block_size == (64, 32)
    assert (first.packed_q, first.packed_k, first.seqused_q, first.seqused_k) == (False, False, False, True)
    call = recorder.calls[1]
    assert call.mask_block_idx.shape == call.full_block_idx.shape == (3, 2, 4, 13)
    assert call.mask_block_cnt.shape == (3, 2, 4) and call.lengths.seqused_k is used
    assert call.aux[0].data_ptr() == aux.data_ptr() and call.aux[1:] == (7, 0.5)
    assert (call.seqlen_q, call.seqlen_k) == (200, 400)


WRONG_RESULTS = {
    "integers": (lambda b, h, q, k, info, aux: q - k, TypeError, "mask_mod: expected a vector of 1 Boolean.*Int32"),
    "a number": (lambda b, h, q, k, info, aux: 1.0, TypeError, "mask_mod: expected .*float"),
    "three": (
        lambda b, h, q, k, info, aux: vector([True] * 3, Boolean), ValueError, "mask_mod: expected .*vector of 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_what_a_mask_mod_must_not_return(name):
    function, kind, message = WRONG_RESULTS[name]
    with pytest.raises(kind, match=message):
        compiler.build(ClassifyProblem(Mod(name, 1, function)), None, "sm_120a")


@pytest.mark.parametrize("arch", ["sm_120a", "sm_121a"])
@pytest.mark.parametrize("mask_mod", [causal_mod, causal_by_four, dense_mod], ids=lambda mod: mod.__name__)
def test_no_stack(mask_mod, arch):
    mod = Mod(mask_mod.__name__, getattr(mask_mod, "__vec_size__", 1), mask_mod)
    problem = ClassifyProblem(mod, aux=(("bool", 4),), packed_q=True, packed_k=True, seqused_q=True, seqused_k=True)
    (kernel,) = cubin.read(compiler.build(problem, None, arch, keep=True).__cubin__)
    assert kernel.stack_bytes == 0
    assert kernel.shared_bytes == RESERVED_BYTES
    assert kernel.registers <= 64  # four blocks of eight warps on an SM


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32"]
)
def test_aux_tensors_of_each_dtype_are_read(dtype, device):
    def of_dtype(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return Boolean(aux_tensors[0][kv_idx[0]] != cutlass.Int32(0).to(aux_tensors[0].element_type))

    values = torch.zeros(70, dtype=getattr(torch, dtype), device=device.torch_device)
    values[33:] = 1
    sparse = BlockSparseTensors.from_mask_mod(of_dtype, None, None, 1, 35, (64, 32), device.torch_device, [values[::2]])
    same(sparse, (values[::2] != 0).expand(1, 1, 1, 35), (64, 32))
