"""plan -> callable. Compiles through TVM FFI with symbolic shapes: one binary a problem, whatever the sizes."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_attn_sm120 import cubin, kernel_file, runtime, shared_object
from flash_attn_sm120.arguments import (
    Arguments,
    BlockLists,
    ClassifyArguments,
    CombineArguments,
    Dropout,
    DualGroupArguments,
    GroupLengths,
    Lengths,
    Modifiers,
    Numbers,
    Partials,
    Queue,
)
from flash_attn_sm120.dispatch import Plan, candidates
from flash_attn_sm120.kernels.classify import ClassifyBlocks
from flash_attn_sm120.kernels.combine import FlashAttentionCombine
from flash_attn_sm120.kernels.decode import FlashAttentionDecodeSm120
from flash_attn_sm120.kernels.dual_group import FlashAttentionDualGroupSm120
from flash_attn_sm120.kernels.forward import FlashAttentionForwardSm120
from flash_attn_sm120.kernels.forward_tma import FlashAttentionForwardSm120Tma
from flash_attn_sm120.problem import AttentionProblem, ClassifyProblem, CombineProblem

KERNELS = {
    "forward": FlashAttentionForwardSm120,
    "forward_tma": FlashAttentionForwardSm120Tma,
    "decode": FlashAttentionDecodeSm120,
    "dual_group": FlashAttentionDualGroupSm120,
    "combine": FlashAttentionCombine,
    "classify": ClassifyBlocks,
}
ONE_WAY = {CombineProblem: "combine", ClassifyProblem: "classify"}  # problems without a plan
DTYPES = {
    "bfloat16": cutlass.BFloat16,
    "float16": cutlass.Float16,
    "float32": Float32,
    "bool": cutlass.Boolean,
    "uint8": cutlass.Uint8,
    "int8": cutlass.Int8,
    "int16": cutlass.Int16,
    "int32": Int32,
    "int64": cutlass.Int64,
    "float8_e4m3fn": cutlass.Float8E4M3FN,
    "float8_e5m2": cutlass.Float8E5M2,
}
Problem = kernel_file.Problem


def build_best(problem: Problem, arch: str, keep: bool = False, lines: bool = False) -> tuple[Any, Plan | None]:
    """(what build makes of the first of the problem's plans that needs no stack, or of the last, that plan)."""
    plans = candidates(problem, arch) if isinstance(problem, AttentionProblem) else [None]
    for plan in plans[:-1]:
        built = build(problem, plan, arch, keep=True, lines=lines)
        if not any(kernel.stack_bytes for kernel in cubin.read(built.__cubin__)):
            return built, plan
    return build(problem, plans[-1], arch, keep, lines), plans[-1]


def build(problem: Problem, plan: Plan | None, arch: str, keep: bool = False, lines: bool = False):
    """Compiles for `arch`, with or without a GPU here. keep: the result carries __ptx__ and __cubin__. lines: the PTX
    says which Python line each instruction is of, and the compilation takes two thirds longer."""
    kernel = KERNELS[ONE_WAY[type(problem)]](problem) if plan is None else KERNELS[plan.kernel](problem, plan)
    options = f"--enable-tvm-ffi --gpu-arch {arch}"
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        # A group of arguments that is empty for a problem is no mistake.
        warnings.filterwarnings("ignore", message=r"Argument (lengths|modifiers|aux) .* cannot be converted")
        if keep:  # what is kept is written to files too, by default in the current directory
            options += f" --keep-ptx --keep-cubin --dump-dir {folder}"
        if lines:
            options += " --generate-line-info"
        signature = {CombineProblem: _combine_signature, ClassifyProblem: _classify_signature}
        arguments = signature.get(type(problem), _signature)(problem)
        if plan is not None and plan.kernel == "forward_tma":
            arguments += (Queue(_rows(Int32, 1), Int32(0)) if plan.persistent else None,)
        return cute.compile(kernel, *arguments, make_fake_stream(use_tvm_ffi_env_stream=True), options=options)


def to_file(built: Any, key: kernel_file.Key) -> bytes:
    """What build returned as the content of its file. One of loader.NOT_KEPT where that can't be made."""
    from flash_attn_sm120 import export  # what it uses of the DSL isn't promised; calls do without

    relocatable = export.to_object(built, key["host"])
    linked = shared_object.link(relocatable, runtime.SYMBOL, runtime.NEEDED)
    return kernel_file.pack(linked, key, export.cuda_release())


def _signature(problem: AttentionProblem) -> tuple:
    """The arguments of a kernel's __call__ as types: sizes and strides stay symbolic."""
    if problem.dual_group:
        return _dual_group_signature(problem)
    dtype = DTYPES[problem.dtype]
    rank_q = 3 if problem.packed_q else 4
    q, out = _matrix(dtype, rank_q), _matrix(dtype, rank_q)
    k, v = (_matrix(DTYPES[problem.kv_dtype or problem.dtype], 3 if problem.packed_k else 4) for _ in range(2))
    lse = _rows(Float32, rank_q - 1) if problem.lse else None
    lengths = Lengths(
        cu_seqlens_q=_rows(Int32, 1) if problem.packed_q else None,
        cu_seqlens_k=_rows(Int32, 1) if problem.packed_k else None,
        seqused_q=_rows(Int32, 1) if problem.seqused_q else None,
        seqused_k=_rows(Int32, 1) if problem.seqused_k else None,
        page_table=_rows(Int32, 2) if problem.paged else None,
        cp_tot_seqused_k=_rows(Int32, 1) if problem.context_parallel else None,
    )
    modifiers = Modifiers(
        learnable_sink=_strided(DTYPES[problem.sink], 1) if problem.sink else None,
        alibi_slopes=_strided(Float32, 2) if problem.alibi else None,
        k_descale=_strided(Float32, 2) if problem.k_descale else None,
        v_descale=_strided(Float32, 2) if problem.v_descale else None,
        dropout=Dropout(_rows(Int64, 1), Int32(0), Int32(0), Float32(0)) if problem.dropout else None,
        blocks=BlockLists(*(_strided(Int32, rank) for rank in (3, 4, 3, 4))) if problem.block_sparse else None,
        aux=_aux_signature(problem.aux) or None,
    )
    numbers = Numbers(Float32(0), Float32(0), *[Int32(0)] * (len(Numbers._fields) - 2))
    arguments = tuple(Arguments(q, k, v, out, lse, lengths, modifiers, numbers))
    if not problem.decode:
        return arguments
    if not problem.split:
        return (*arguments, None)
    return (*arguments, Partials(_matrix(Float32, rank_q + 1), _rows(Float32, rank_q), _rows(Int32, 1), Int32(0)))


def _dual_group_signature(problem: AttentionProblem) -> tuple:
    """The arguments of the dual-group kernel's __call__ as types."""
    dtype = DTYPES[problem.dtype]
    limits = [_rows(Int32, 1) if problem.seqused_k else Int32(0) for _ in range(2)]
    arguments = DualGroupArguments(
        *(_matrix(dtype, 3) for _ in range(6)),
        *(_rows(Float32, 2) for _ in range(2)),
        lengths=GroupLengths(*(_rows(Int32, 1) for _ in range(3)), *limits),
        learnable_sink=_strided(DTYPES[problem.sink], 1) if problem.sink else None,
        numbers=Numbers(Float32(0), Float32(0), *[Int32(0)] * (len(Numbers._fields) - 2)),
    )
    return tuple(arguments)


def _combine_signature(problem: CombineProblem) -> tuple:
    """The arguments of the combine kernel's __call__ as types."""
    rank = 3 if problem.packed else 4
    arguments = CombineArguments(
        out_partial=_matrix(Float32, rank + 1),
        lse_partial=_strided(Float32, rank),
        out=_matrix(DTYPES[problem.dtype], rank),
        lse=_rows(Float32, rank - 1) if problem.lse else None,
        cu_seqlens=_rows(Int32, 1) if problem.cu_seqlens else None,
        seqused=_rows(Int32, 1) if problem.seqused else None,
        learnable_sink=_strided(DTYPES[problem.sink], 1) if problem.sink else None,
    )
    return tuple(arguments)


def _classify_signature(problem: ClassifyProblem) -> tuple:
    """The arguments of the classifier's __call__ as types."""
    flags = (problem.packed_q, problem.packed_k, problem.seqused_q, problem.seqused_k)
    arguments = ClassifyArguments(
        mask_block_cnt=_rows(Int32, 3),
        mask_block_idx=_rows(Int32, 4),
        full_block_cnt=_rows(Int32, 3),
        full_block_idx=_rows(Int32, 4),
        lengths=Lengths(*[_rows(Int32, 1) if flag else None for flag in flags]),
        aux=_aux_signature(problem.aux),
        seqlen_q=Int32(0),
        seqlen_k=Int32(0),
    )
    return tuple(arguments)


def _aux_signature(aux: tuple) -> tuple:
    """What a mod reads: tensors of any strides, and scalars."""
    return tuple(DTYPES[entry](0) if isinstance(entry, str) else _strided(DTYPES[entry[0]], entry[1]) for entry in aux)


def _matrix(dtype: type, rank: int):
    """Last dimension contiguous; address and the other strides, which are 64-bit, of whole 16 bytes."""
    return _tensor(dtype, rank, 16, 128 // dtype.width, last=1)


def _rows(dtype: type, rank: int):
    """Last dimension contiguous; the other strides 64-bit."""
    return _tensor(dtype, rank, max(1, dtype.width // 8), 1, last=1)


def _strided(dtype: type, rank: int):
    """Any strides, 64-bit; 0 repeats a value."""
    shape, stride = (tuple(kind() for _ in range(rank)) for kind in (cute.sym_int32, cute.sym_int64))
    return make_fake_tensor(dtype, shape, stride, assumed_align=max(dtype.width // 8, 1))


def _tensor(dtype: type, rank: int, align: int, divisibility: int, last):
    shape = tuple(cute.sym_int32() for _ in range(rank))
    stride = (*(cute.sym_int64(divisibility=divisibility) for _ in range(rank - 1)), last)
    return make_fake_tensor(dtype, shape, stride, assumed_align=align)
