"""plan -> callable. Compiles through TVM FFI with symbolic shapes: one binary a problem, whatever the sizes."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_attn_sm120.arguments import Arguments, Lengths, Modifiers, Numbers, Partials
from flash_attn_sm120.dispatch import Plan, choose
from flash_attn_sm120.kernels.combine import CombineProblem, FlashAttentionCombine
from flash_attn_sm120.kernels.decode import FlashAttentionDecodeSm120
from flash_attn_sm120.kernels.forward import FlashAttentionForwardSm120
from flash_attn_sm120.kernels.forward_tma import FlashAttentionForwardSm120Tma
from flash_attn_sm120.problem import AttentionProblem

KERNELS = {
    "forward": FlashAttentionForwardSm120,
    "forward_tma": FlashAttentionForwardSm120Tma,
    "decode": FlashAttentionDecodeSm120,
}
DTYPES = {
    "bfloat16": cutlass.BFloat16,
    "float16": cutlass.Float16,
    "float32": Float32,
    "float8_e4m3fn": cutlass.Float8E4M3FN,
    "float8_e5m2": cutlass.Float8E5M2,
}

_loaded: dict[tuple[AttentionProblem | CombineProblem, str], Callable] = {}
_lock = threading.Lock()


def load(problem: AttentionProblem | CombineProblem, arch: str) -> Callable:
    """The launcher for a problem on a target such as "sm_120a"; compiled on first use, by one thread at a time.

    Call it as fn(*arguments.Arguments(...)), a decode as fn(*arguments.Arguments(...), partials) with partials None or
    arguments.Partials(...), a combination as fn(out_partial, lse_partial, out, lse, cu_seqlens_q); plain tuples serve
    as groups. It launches on PyTorch's current stream.
    """
    key = (problem, arch)
    launcher = _loaded.get(key)
    if launcher is None:
        with _lock:
            launcher = _loaded.get(key)
            if launcher is None:
                combines = isinstance(problem, CombineProblem)
                built = build_combine(problem, arch) if combines else build(problem, choose(problem, arch), arch)
                launcher = _loaded[key] = built
    return launcher


def build(problem: AttentionProblem, plan: Plan, arch: str, keep: bool = False):
    """Compiles for `arch`, with or without a GPU here. keep: the result carries __ptx__ and __cubin__."""
    return _build(KERNELS[plan.kernel](problem, plan), _signature(problem), arch, keep)


def build_combine(problem: CombineProblem, arch: str, keep: bool = False):
    """build for a combination."""
    return _build(FlashAttentionCombine(problem), _combine_signature(problem), arch, keep)


def _build(kernel, signature: tuple, arch: str, keep: bool):
    options = f"--enable-tvm-ffi --gpu-arch {arch}"
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        # A group of arguments that is empty for a problem is no mistake.
        warnings.filterwarnings("ignore", message=r"Argument (lengths|modifiers) .* cannot be converted")
        if keep:  # what is kept is written to files too, by default in the current directory
            options += f" --generate-line-info --keep-ptx --keep-cubin --dump-dir {folder}"
        return cute.compile(kernel, *signature, options=options)


def _combine_signature(problem: CombineProblem) -> tuple:
    rank = 3 if problem.packed else 4
    partial, out = _matrix(Float32, rank + 1, divisibility=4), _matrix(DTYPES[problem.dtype], rank, divisibility=4)
    lse_partial, lse = _strided(rank), _strided(rank - 1) if problem.lse else None
    cu_seqlens_q = _lengths() if problem.packed else None
    return partial, lse_partial, out, lse, cu_seqlens_q, make_fake_stream(use_tvm_ffi_env_stream=True)


def _strided(rank: int):
    """float32 with any strides."""
    shape, stride = (tuple(make() for _ in range(rank)) for make in (cute.sym_int32, cute.sym_int64))
    return make_fake_tensor(Float32, shape, stride, assumed_align=4)


def _signature(problem: AttentionProblem) -> tuple:
    """The arguments of a kernel's __call__ as types: sizes and strides stay symbolic."""
    dtype = DTYPES[problem.dtype]
    kv_dtype = DTYPES[problem.kv_dtype or problem.dtype]
    rank_q, rank_k = (3 if packed else 4 for packed in (problem.packed_q, problem.packed_k))
    q, out = _matrix(dtype, rank_q), _matrix(dtype, rank_q)
    k, v = (_matrix(kv_dtype, rank_k, divisibility=128 // kv_dtype.width) for _ in range(2))
    lse = _matrix(Float32, rank_q - 1, align=4, divisibility=1) if problem.lse else None
    numbers = Numbers(Float32(0), Float32(0), *[Int32(0)] * (len(Numbers._fields) - 2))
    arguments = Arguments(q, k, v, out, lse, _lengths_of(problem), _modifiers_of(problem), numbers)
    partials = ()
    if problem.decode:
        partials = (None,)
        if problem.split:
            partial = _matrix(Float32, rank_q + 1, divisibility=4)
            lse_partial = _matrix(Float32, rank_q, align=4, divisibility=1)
            partials = (Partials(partial, lse_partial, _lengths(), Int32(0)),)
    return (*arguments, *partials, make_fake_stream(use_tvm_ffi_env_stream=True))


def _lengths_of(problem: AttentionProblem) -> Lengths:
    flags = (problem.packed_q, problem.packed_k, problem.seqused_q, problem.seqused_k)
    table = _matrix(Int32, 2, align=4, divisibility=1) if problem.page_size else None
    return Lengths(
        *[_lengths() if given else None for given in flags], table, _lengths() if problem.context_parallel else None
    )


def _modifiers_of(problem: AttentionProblem) -> Modifiers:
    def by_batch(given: bool):  # (batch, heads or heads_kv)
        return _matrix(Float32, 2, align=4, divisibility=1) if given else None

    sink = None
    if problem.sink:
        sink = make_fake_tensor(DTYPES[problem.sink], (cute.sym_int32(),), (1,), assumed_align=2)
    return Modifiers(sink, by_batch(problem.alibi), by_batch(problem.k_descale), by_batch(problem.v_descale))


def _matrix(dtype: type, rank: int, align: int = 16, divisibility: int = 8):
    """Last dimension contiguous; the other strides 64-bit multiples of `divisibility` elements."""
    shape = tuple(cute.sym_int32() for _ in range(rank))
    stride = (*(cute.sym_int64(divisibility=divisibility) for _ in range(rank - 1)), 1)
    return make_fake_tensor(dtype, shape, stride, assumed_align=align)


def _lengths():
    return make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=4)
