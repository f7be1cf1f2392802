"""Compiled signatures take the tensors that the interface hands over, repeated ones and float8 ones among them.

A probe stands in for the kernels: it reads the last element of every tensor that its problem has, and writes them down.
"""

import cutlass
import pytest
import torch
from cutlass import Float32, cute

from flash_attn_sm120 import compile as compiler
from flash_attn_sm120.arguments import Arguments, CombineArguments, Lengths, Modifiers, Numbers, Partials
from flash_attn_sm120.dispatch import Plan, plan_for
from flash_attn_sm120.problem import AttentionProblem, CombineProblem
from flash_attn_sm120.simulator import simulate
from flash_attn_sm120.simulator.launch import launch

PLAN = plan_for("forward", AttentionProblem("bfloat16", 64, 64))
SPARE = 20  # places in the report


@cute.jit
def last(tensor: cute.Tensor):
    index = tuple(size - 1 for size in tensor.shape)
    return tensor[index]


class Probe:
    def __init__(self, problem, plan: Plan):
        self.problem = problem

    @cute.jit
    def __call__(self, mQ, mK, mV, mO, mLSE, lengths, modifiers, numbers, stream):
        self.kernel((*lengths, *modifiers), mLSE).launch(grid=(1, 1, 1), block=(1, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, tensors: tuple, report: cute.Tensor):
        place = 0
        for tensor in tensors:
            if cutlass.const_expr(tensor is not None):
                report[0, 0, place] = Float32(last(tensor))
                place += 1


class DecodeProbe(Probe):
    @cute.jit
    def __call__(
        self, mQ, mK, mV, mO, mLSE, lengths: Lengths, modifiers: Modifiers, numbers: Numbers, partials, stream
    ):
        given = (*lengths, *modifiers)
        if cutlass.const_expr(partials is not None):
            given = (*given, *partials[:3])
        self.kernel(given, mLSE).launch(grid=(1, 1, 1), block=(1, 1, 1), stream=stream)


class CombineProbe(Probe):
    @cute.jit
    def __call__(self, mPartial, mLSEPartial, mO, mLSE, mCuSeqlens, mSeqused, mSink, stream):
        tensors = (mPartial, mLSEPartial, mCuSeqlens, mSeqused, mSink)
        self.kernel(tensors, mLSE).launch(grid=(1, 1, 1), block=(1, 1, 1), stream=stream)


def reported(monkeypatch, probe, problem, arguments, report):
    monkeypatch.setitem(compiler.KERNELS, PLAN.kernel, probe)
    kernel = compiler.build(problem, PLAN, "sm_120a", keep=True)
    with simulate("sm_120a"):
        launch(kernel, arguments, names=[f"argument {i}" for i in range(len(arguments))])
    return report[0, 0]


def numbers(*shape, dtype=torch.float32):
    return torch.randint(1, 90, shape).to(dtype)


@pytest.mark.parametrize("kv_dtype", ["", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("split", [None, False, True])
def test_every_tensor_of_serving_arrives(kv_dtype, split, monkeypatch):
    features = {"page_size": 16, "k_descale": True, "v_descale": True, "sink": "bfloat16", "alibi": True}
    decode = {} if split is None else {"decode": True, "split": split}
    problem = AttentionProblem(
        "float16", 64, 32, mask="causal", lse=True, seqused_k=True, kv_dtype=kv_dtype,
        context_parallel=True, **features, **decode,
    )  # fmt: skip
    kv = getattr(torch, kv_dtype or "float16")
    q, out = torch.zeros(2, 5, 4, 64).half(), torch.zeros(2, 5, 4, 32).half()
    both = torch.zeros(6, 2, 16, 2, 64).to(kv)
    report = torch.zeros(1, 1, SPARE)
    lengths = Lengths(
        None, None, None, numbers(2, dtype=torch.int32),
        numbers(2, 7, dtype=torch.int32)[:, :4], numbers(2, dtype=torch.int32),
    )  # fmt: skip
    modifiers = Modifiers(numbers(4).bfloat16(), numbers(4).expand(2, 4), numbers(1).expand(2, 2), numbers(2, 2).T)
    arguments = Arguments(q, both[:, 0], both[:, 1, ..., :32], out, report, lengths, modifiers, Numbers())
    given = [tensor for tensor in (*lengths, *modifiers) if tensor is not None]
    rest = ()
    if split is not None:
        rest = (None,)
    if split:
        rest = (Partials(numbers(3, 2, 5, 4, 32), numbers(3, 2, 4, 5), numbers(8, dtype=torch.int32), 4),)
        given += rest[0][:3]
    probe = Probe if split is None else DecodeProbe
    found = reported(monkeypatch, probe, problem, (*arguments, *rest), report)
    assert found[: len(given)].tolist() == [tensor.flatten()[-1].item() for tensor in given]
    assert (found[len(given) :] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_of_a_combine_arrives(dtype, monkeypatch):
    problem = CombineProblem(dtype, 32, lse=True, cu_seqlens=True, seqused=True, sink="float32")
    report = torch.zeros(1, 1, SPARE)
    given = [
        numbers(3, 2, 5, 4, 40)[..., :32], numbers(3, 2, 5, 4).mT,
        numbers(3, dtype=torch.int32), numbers(2, dtype=torch.int32), numbers(4),
    ]  # fmt: skip
    out = torch.zeros(2, 5, 4, 32).to(getattr(torch, dtype))
    arguments = CombineArguments(*given[:2], out, report, *given[2:])
    found = reported(monkeypatch, CombineProbe, problem, tuple(arguments), report)
    assert found[:5].tolist() == [tensor.flatten()[-1].item() for tensor in given]
