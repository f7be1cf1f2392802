"""Wrong block sparsity raises before any launch, in the words of the package. None of this needs a GPU."""

import dataclasses
import re

import pytest
import sparse_cases  # noqa: F401
import torch
from torch.nn.attention.flex_attention import create_block_mask

from flash_attn_sm120 import BlockSparseTensors, checks
from flash_attn_sm120.checks_sparse import check_block_sparse, check_block_sparse_values
from flash_attn_sm120.problem import ClassifyProblem, Mod

V, T = ValueError, TypeError
CPU = torch.device("cpu")
NAME = "block_sparse_tensors"


def full(*shape, value=0, dtype=torch.int32, device="cpu"):
    return torch.full(shape, value, dtype=dtype, device=device)


def checked(batch=2, heads=4, seqlen_q=300, seqlen_k=500, exact=True, sparse=None, **changes):
    """A right call, but for `changes` (three blocks of 128 rows, four of 128 columns)."""
    lists = {"mask_block_cnt": full(2, 1, 3), "mask_block_idx": full(2, 1, 3, 4)}
    lists |= {"full_block_cnt": full(1, 4, 3), "full_block_idx": full(1, 4, 3, 4)}
    sparse = BlockSparseTensors(**{**lists, **changes}) if sparse is None else sparse
    check_block_sparse(sparse, batch, heads, seqlen_q, seqlen_k, CPU, exact)


def with_values(seqlen_k=500, **changes):
    """Two batches with one head and two rows of blocks; batch 1 has blocks."""
    lists = {
        "mask_block_cnt": torch.tensor([[[0, 0]], [[2, 1]]], dtype=torch.int32),
        "mask_block_idx": torch.tensor([[[[9, 9, 9]] * 2], [[[0, 3, 0], [2, -7, 9]]]], dtype=torch.int32),
        "full_block_cnt": torch.tensor([[[1, 2]]], dtype=torch.int32),
        "full_block_idx": torch.tensor([[[[1, 3, 3], [0, 3, 2]]]], dtype=torch.int32),
    }
    for name, (place, value) in changes.items():
        lists[name][place] = value
    check_block_sparse_values(BlockSparseTensors(**lists), seqlen_k)


def dense(**changes):
    return BlockSparseTensors.from_dense(**{"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool), **changes})


def causal(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return q_idx >= kv_idx


def classified(**changes):
    sizes = {"batch": 2, "heads": 3, "seqlen_q": 100, "seqlen_k": 200, "device": "cpu"}
    return BlockSparseTensors.from_mask_mod(**{"mask_mod": causal, **sizes, **changes})


def of_block_mask(**changes):
    given = {"Q_LEN": 256, "KV_LEN": 256, "B": None, "H": None, "device": "cpu", **changes}
    return BlockSparseTensors.from_block_mask(create_block_mask(lambda b, h, q, k: q >= k, **given))


def problem(**changes):
    return ClassifyProblem(**{"mask_mod": Mod("digest", 1, causal), **changes})


F32, LONG = torch.float32, torch.int64
FOUR = torch.zeros(2, 1, 3, 4, 2, dtype=torch.int32)[..., 0]  # of stride 2
NONE = dict.fromkeys(("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx"))
# (name, call, exception, argument named, what the rest of the message must hold, changes)
WRONG = [
    ("a tuple", checked, T, NAME, ["BlockSparseTensors", "tuple"], {"sparse": ()}),
    ("no lists", checked, V, NAME, ["mask_block_cnt", "full_block_cnt"], NONE),
    ("cnt of a list", checked, T, f"{NAME}.mask_block_cnt", ["int32", "list"], {"mask_block_cnt": [0]}),
    ("cnt float", checked, T, f"{NAME}.mask_block_cnt", ["int32", "float32"],
     {"mask_block_cnt": full(2, 1, 3, dtype=F32)}),
    ("idx int64", checked, T, f"{NAME}.full_block_idx", ["int32", "int64"],
     {"full_block_idx": full(1, 4, 3, 4, dtype=LONG)}),
    ("cnt without idx", checked, T, f"{NAME}.mask_block_idx", ["int32", "None"], {"mask_block_idx": None}),
    ("idx without cnt", checked, T, f"{NAME}.full_block_cnt", ["int32", "None"], {"full_block_cnt": None}),
    ("rank of cnt", checked, V, f"{NAME}.mask_block_cnt", ["m_blocks)", "(2, 3)"], {"mask_block_cnt": full(2, 3)}),
    ("rank of idx", checked, V, f"{NAME}.full_block_idx", ["n_blocks)", "(4, 3, 4)"],
     {"full_block_idx": full(4, 3, 4)}),
    ("device", checked, V, f"{NAME}.full_block_cnt", ["cpu", "meta"], {"full_block_cnt": full(1, 4, 3, device="meta")}),
    ("batch", checked, V, f"{NAME}.mask_block_cnt", ["1 or 2", "(batch)", "(3, 1, 3)"],
     {"mask_block_cnt": full(3, 1, 3)}),
    ("batch of one", checked, V, f"{NAME}.mask_block_cnt", ["expected 1 as", "(2, 1, 3)"], {"batch": 1}),
    ("heads", checked, V, f"{NAME}.full_block_cnt", ["1 or 8", "(heads)", "(1, 4, 3)"], {"heads": 8}),
    ("too few m_blocks", checked, V, f"{NAME}.mask_block_cnt", ["4 blocks of 128 rows", "385"], {"seqlen_q": 385}),
    ("too many m_blocks", checked, V, f"{NAME}.mask_block_cnt", ["2 blocks of 128 rows", "256"], {"seqlen_q": 256}),
    ("m_blocks of the longest", checked, V, f"{NAME}.mask_block_cnt", ["at least 4 blocks", "385"],
     {"seqlen_q": 385, "exact": False}),
    ("m_blocks of the lists", checked, V, f"{NAME}.full_block_cnt", ["3 m_blocks", "got 4"],
     {"full_block_cnt": full(1, 4, 4), "full_block_idx": full(1, 4, 4, 4), "seqlen_q": None}),
    ("idx beside cnt", checked, V, f"{NAME}.full_block_idx", ["(1, 4, 3, n_blocks)", "(2, 4, 3, 4)"],
     {"full_block_idx": full(2, 4, 3, 4)}),
    ("no n_blocks", checked, V, f"{NAME}.mask_block_idx", ["one n_block", "(2, 1, 3, 0)"],
     {"mask_block_idx": full(2, 1, 3, 0)}),
    ("n_blocks of another length", checked, V, f"{NAME}.mask_block_idx", ["at most 3", "384"], {"seqlen_k": 384}),
    ("stride of idx", checked, V, f"{NAME}.mask_block_idx", ["stride 1", "strides"], {"mask_block_idx": FOUR}),
    ("rows of a block", checked, V, "block_size", ["multiple of 64", "(96, 128)"], {"block_size": (96, 128)}),
    ("columns of a block", checked, V, "block_size", ["multiple of 32", "(128, 48)"], {"block_size": (128, 48)}),
    ("no rows", checked, V, "block_size", ["multiple of 64", "0"], {"block_size": 0}),
    ("below zero", checked, V, "block_size", ["multiple of 32", "-32"], {"block_size": (64, -32)}),
    ("three sides", checked, V, "block_size", ["(rows, columns)", "(64, 64, 64)"], {"block_size": (64, 64, 64)}),
    ("a side of 64.0", checked, T, "block_size", ["int", "64.0"], {"block_size": (64.0, 64)}),
    ("a flag", checked, T, "block_size", ["int", "True"], {"block_size": True}),
    ("count below zero", with_values, V, f"{NAME}.mask_block_cnt", ["from 0 to 3", "-1 at batch 1, head 0, m_block 1"],
     {"mask_block_cnt": ((1, 0, 1), -1)}),
    ("count too high", with_values, V, f"{NAME}.full_block_cnt", ["from 0 to 3", "4 at batch 0, head 0, m_block 0"],
     {"full_block_cnt": ((0, 0, 0), 4)}),
    ("index below zero", with_values, V, f"{NAME}.mask_block_idx",
     ["from 0 to 3", "-1 at batch 1, head 0, m_block 1, position 0"], {"mask_block_idx": ((1, 0, 1, 0), -1)}),
    ("index too high", with_values, V, f"{NAME}.mask_block_idx",
     ["from 0 to 3", "4 at batch 1, head 0, m_block 0, position 1"], {"mask_block_idx": ((1, 0, 0, 1), 4)}),
    ("index of a shorter seqlen_k", with_values, V, f"{NAME}.mask_block_idx",
     ["from 0 to 2", "3 at batch 1, head 0, m_block 0, position 1"], {"seqlen_k": 384}),
    ("index below zero of an unknown length", with_values, V, f"{NAME}.mask_block_idx", ["-5 at"],
     {"mask_block_idx": ((1, 0, 1, 0), -5), "seqlen_k": None}),
    ("falling", with_values, V, f"{NAME}.full_block_idx",
     ["rise", "1 at batch 0, head 0, m_block 1, position 1"], {"full_block_idx": ((0, 0, 1), torch.tensor([2, 1, 3]))}),
    ("twice", with_values, V, f"{NAME}.full_block_idx",
     ["rise", "0 at batch 0, head 0, m_block 1, position 1"], {"full_block_idx": ((0, 0, 1, 1), 0)}),
    ("in both lists", with_values, V, f"{NAME}.full_block_idx",
     ["mask_block_idx", "3 at batch 1, head 0, m_block 1, position 1"], {"mask_block_idx": ((1, 0, 1, 0), 3)}),
    ("mask of ints", dense, T, "mask", ["bool", "int32"], {"mask": full(1, 1, 9, 9)}),
    ("mask of a list", dense, T, "mask", ["bool", "list"], {"mask": [[True]]}),
    ("rank of a mask", dense, V, "mask", ["seqlen_q, seqlen_k)", "(9, 9)"], {"mask": full(9, 9, dtype=torch.bool)}),
    ("size of a dense mask's blocks", dense, V, "block_size", ["multiple of 64", "100"], {"block_size": 100}),
    ("no BlockMask", BlockSparseTensors.from_block_mask, T, "block_mask", ["BlockMask", "None"], {"block_mask": None}),
    ("BLOCK_SIZE of a BlockMask", of_block_mask, V, "block_mask.BLOCK_SIZE", ["multiple of 64", "32"],
     {"BLOCK_SIZE": 32}),
    ("no mask_mod", classified, T, "mask_mod", ["a function", "None"], {"mask_mod": None}),
    ("seqlen_q of a float", classified, T, "seqlen_q", ["int", "1.5"], {"seqlen_q": 1.5}),
    ("seqlen_k of a flag", classified, T, "seqlen_k", ["int", "True"], {"seqlen_k": True}),
    ("seqlen_k below zero", classified, V, "seqlen_k", ["from 0", "-1"], {"seqlen_k": -1}),
    ("no batch", classified, V, "batch", ["from 1", "got 0"], {"batch": 0}),
    ("no heads", classified, V, "heads", ["from 1", "got 0"], {"heads": 0}),
    ("too many rows of blocks", classified, V, "batch", ["2^31", "(2147483647, 3, 1)"], {"batch": 2**31 - 1}),
    ("aux tensors alone", classified, T, "aux_tensors", ["tuple or list", "float32"], {"aux_tensors": torch.zeros(3)}),
    ("aux of a number", classified, T, "aux_tensors[0]", ["tensor", "3"], {"aux_tensors": [3]}),
    ("aux complex", classified, T, "aux_tensors[1]", ["bfloat16", "complex64"],
     {"aux_tensors": [torch.zeros(3), torch.zeros(3, dtype=torch.complex64)]}),
    ("aux rank", classified, V, "aux_tensors[0]", ["dimension", "()"], {"aux_tensors": [torch.zeros(())]}),
    ("aux elsewhere", classified, V, "aux_tensors[0]", ["cpu", "meta"],
     {"aux_tensors": [torch.zeros(3, device="meta")]}),
    ("scalars alone", classified, T, "aux_scalars", ["tuple or list", "3"], {"aux_scalars": 3}),
    ("scalar of a string", classified, T, "aux_scalars[0]", ["float", "'3'"], {"aux_scalars": ["3"]}),
    ("scalar of 33 bits", classified, V, "aux_scalars[1]", ["32 bits", "2147483648"], {"aux_scalars": [0, 2**31]}),
    ("cu_seqlens int64", classified, T, "cu_seqlens_q", ["int32", "int64"], {"cu_seqlens_q": full(3, dtype=LONG)}),
    ("cu_seqlens empty", classified, V, "cu_seqlens_k", ["batch + 1", "(0,)"], {"cu_seqlens_k": full(0)}),
    ("cu_seqlens of another batch", classified, V, "cu_seqlens_k", ["batch of 2", "got 3"], {"cu_seqlens_k": full(4)}),
    ("lengths of two batches", classified, V, "seqused_k", ["batch of 3 as cu_seqlens_q", "got 2"],
     {"batch": None, "cu_seqlens_q": full(4), "seqused_k": full(2)}),
    ("seqused of a list", classified, T, "seqused_q", ["int32", "list"], {"seqused_q": [1, 2]}),
    ("stride of seqused", classified, V, "seqused_q", ["contiguous", "(2,)"], {"seqused_q": full(4)[::2]}),
    ("seqused elsewhere", classified, V, "seqused_q", ["cpu", "meta"], {"seqused_q": full(2, device="meta")}),
    ("a device without kernels", classified, V, "device", ["CUDA", "cpu"], {}),
    ("a problem's blocks", problem, V, "block_size", ["64", "(64, 16)"], {"block_size": (64, 16)}),
    ("a problem's tensors", problem, V, "aux", ["bfloat16", "complex64"], {"aux": (("complex64", 1),)}),
    ("a problem's scalars", problem, V, "aux", ["int32", "int64"], {"aux": ("int64",)}),
]  # fmt: skip


@pytest.mark.parametrize("name, call, kind, argument, parts, changes", WRONG, ids=[case[0] for case in WRONG])
def test_refused(name, call, kind, argument, parts, changes):
    with pytest.raises(kind) as caught:
        call(**changes)
    message = str(caught.value)
    assert message.startswith(f"{argument}: expected ") and ", got " in message
    assert all(part in message for part in parts), message


def test_right_ones_pass():
    checked()
    checked(full_block_cnt=None, full_block_idx=None)
    checked(mask_block_cnt=None, mask_block_idx=None)
    checked(exact=False, seqlen_q=200, seqlen_k=300)
    checked(seqlen_q=None, seqlen_k=None)
    checked(seqlen_k=1000)
    with_values()
    with_values(seqlen_k=None)
    problem(aux=(("bool", 4), "int32", "float32"))


def test_an_empty_list_shares_nothing():
    """What lies beyond the counts isn't compared."""
    sparse = BlockSparseTensors(full(1, 1, 1), full(1, 1, 1, 3), full(1, 1, 1), full(1, 1, 1, 3))
    check_block_sparse_values(sparse, 100)


@pytest.mark.parametrize("side, lengths", [("q", {"cu_seqlens_q": [0, 101, 150]}), ("k", {"seqused_k": [7, 201]})])
def test_longer_sequences_than_said(side, lengths, monkeypatch, recorder):
    lengths = {name: torch.tensor(value, dtype=torch.int32) for name, value in lengths.items()}
    classified(**lengths)
    monkeypatch.setattr(checks, "VALUE_CHECKS", True)
    with pytest.raises(V, match=f"seqlen_{side}: expected at least {101 if side == 'q' else 201}"):
        classified(**lengths)
    classified(seqlen_q=101, seqlen_k=201, **lengths)


def test_fields_cannot_change():
    sparse = dense()
    with pytest.raises(dataclasses.FrozenInstanceError):
        sparse.block_size = (64, 64)
    assert re.search("block_size=", repr(sparse))
