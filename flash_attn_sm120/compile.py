"""plan -> callable. Compiles through TVM FFI with symbolic shapes: one binary a problem, whatever the sizes."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_attn_sm120.arguments import Arguments, Lengths, Modifiers, Numbers
from flash_attn_sm120.dispatch import Plan, choose
from flash_attn_sm120.kernels.forward import FlashAttentionForwardSm120
from flash_attn_sm120.kernels.forward_tma import FlashAttentionForwardSm120Tma
from flash_attn_sm120.problem import AttentionProblem

KERNELS = {"forward": FlashAttentionForwardSm120, "forward_tma": FlashAttentionForwardSm120Tma}
DTYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}

_loaded: dict[tuple[AttentionProblem, str], Callable] = {}
_lock = threading.Lock()


def load(problem: AttentionProblem, arch: str) -> Callable:
    """The launcher for a problem on a target such as "sm_120a"; compiled on first use, by one thread at a time.

    Call it as fn(*arguments.Arguments(...)); plain tuples serve as its groups. It launches on PyTorch's current stream.
    """
    key = (problem, arch)
    launcher = _loaded.get(key)
    if launcher is None:
        with _lock:
            launcher = _loaded.get(key)
            if launcher is None:
                launcher = _loaded[key] = build(problem, choose(problem, arch), arch)
    return launcher


def build(problem: AttentionProblem, plan: Plan, arch: str, keep: bool = False):
    """Compiles for `arch`, with or without a GPU here. keep: the result carries __ptx__ and __cubin__."""
    kernel = KERNELS[plan.kernel](problem, plan)
    options = f"--enable-tvm-ffi --gpu-arch {arch}"
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        # A group of arguments that is empty for a problem is no mistake.
        warnings.filterwarnings("ignore", message=r"Argument (lengths|modifiers) .* cannot be converted")
        if keep:  # what is kept is written to files too, by default in the current directory
            options += f" --generate-line-info --keep-ptx --keep-cubin --dump-dir {folder}"
        return cute.compile(kernel, *_signature(problem), options=options)


def _signature(problem: AttentionProblem) -> tuple:
    """The arguments of a kernel's __call__ as types: sizes and strides stay symbolic."""
    dtype = DTYPES[problem.dtype]
    rank_q, rank_k = (3 if packed else 4 for packed in (problem.packed_q, problem.packed_k))
    q, out = _matrix(dtype, rank_q), _matrix(dtype, rank_q)
    k, v = _matrix(dtype, rank_k), _matrix(dtype, rank_k)
    lse = _matrix(Float32, rank_q - 1, align=4, divisibility=1) if problem.lse else None
    flags = (problem.packed_q, problem.packed_k, problem.seqused_q, problem.seqused_k)
    lengths = Lengths(*[_lengths() if given else None for given in flags])
    numbers = Numbers(Float32(0), Float32(0), *[Int32(0)] * (len(Numbers._fields) - 2))
    arguments = Arguments(q, k, v, out, lse, lengths, Modifiers(), numbers)
    return (*arguments, make_fake_stream(use_tvm_ffi_env_stream=True))


def _matrix(dtype: type, rank: int, align: int = 16, divisibility: int = 8):
    """Last dimension contiguous; the other strides 64-bit multiples of `divisibility` elements."""
    shape = tuple(cute.sym_int32() for _ in range(rank))
    stride = (*(cute.sym_int64(divisibility=divisibility) for _ in range(rank - 1)), 1)
    return make_fake_tensor(dtype, shape, stride, assumed_align=align)


def _lengths():
    return make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=4)
