"""A kernel that evaluates a mod at every (batch, head, row, column) and stores what comes, as an attention kernel calls
it: a thread's columns are pairs 8 apart, and those beyond the last column are evaluated at the last."""

import warnings
from typing import Any, NamedTuple

import cutlass
import torch
from cutlass import Boolean, Float32, Int32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from flash_attn_sm120 import simulator
from flash_attn_sm120.device.mods import vector

DTYPES = {
    torch.float32: Float32,
    torch.float16: cutlass.Float16,
    torch.bfloat16: cutlass.BFloat16,
    torch.int32: Int32,
    torch.uint8: cutlass.Uint8,
    torch.bool: Boolean,
}


class Info(NamedTuple):
    """Lengths of one sequence and its first rows in a packed batch: Int32 in the kernel, ints for a twin."""

    seqlen_q: Any
    seqlen_k: Any
    offset_q: Any = 0
    offset_k: Any = 0


class Everywhere:
    """out[b, h, q, k] = score_mod(scores[b, h, q, k], ...), or 0 and 1 of a mask mod where scores is None."""

    def __init__(self, mod):
        self.mod = mod
        self.width = getattr(mod, "__vec_size__", 1)

    @cute.jit
    def __call__(self, mO: cute.Tensor, mS: cute.Tensor | None, info: Info, aux: tuple, stream):
        batch, heads, rows, cols = mO.shape
        chunks = cute.ceil_div(cols, 4 * self.width) * 4
        grid = (cute.ceil_div(chunks, 32), rows, batch * heads)
        self.kernel(mO, mS, info, aux).launch(grid=grid, block=(32, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, mO: cute.Tensor, mS: cute.Tensor | None, info: Info, aux: tuple):
        lane, _, _ = cute.arch.thread_idx()
        block, row, place = cute.arch.block_idx()
        batch, head = place // mO.shape[1], place % mO.shape[1]
        chunk = 32 * block + lane
        n, last = self.width, mO.shape[3] - 1
        if cutlass.const_expr(n == 1):
            cols = [chunk]
        else:
            cols = [chunk // 4 * (4 * n) + chunk % 4 * 2 + (i // 2 * 8 + i % 2) for i in range(n)]
        inside = [cutlass.min(col, last) for col in cols]
        b, h, q = (vector([value] * n, Int32) for value in (batch, head, row))
        k = vector(inside, Int32)
        if cutlass.const_expr(mS is not None):
            score = vector([mS[batch, head, row, col] for col in inside], Float32)
            result = self.mod(score, b, h, q, k, info, aux)
            assert result.dtype is Float32 and result.shape in (n, (n,))
        else:
            result = self.mod(b, h, q, k, info, aux)
            assert result.dtype is Boolean and result.shape in (n, (n,))
        values = [Float32(result[i]) for i in range(n)]  # a vector keeps what was taken out of it: not in a branch
        for i in cutlass.range_constexpr(n):
            if cols[i] <= last:
                mO[batch, head, row, cols[i]] = values[i]


def compiled(mod, scored: bool, aux, folder):
    """fn(out, scores or None, info, aux) for aux of these kinds."""
    info = Info(*[Int32(0)] * 4)
    own = tuple(_fake(x) if isinstance(x, torch.Tensor) else _number(x) for x in aux)
    arguments = (_fake(torch.empty(0, 0, 0, 0)), _fake(torch.empty(0, 0, 0, 0)) if scored else None, info, own)
    options = f"--enable-tvm-ffi --gpu-arch sm_120a --keep-ptx --dump-dir {folder}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Argument aux .* cannot be converted")  # where it is empty
        return cute.compile(Everywhere(mod), *arguments, make_fake_stream(use_tvm_ffi_env_stream=True), options=options)


def _number(value):
    return Float32(value) if isinstance(value, float) else Int32(value)


def _fake(tensor: torch.Tensor):
    dtype, rank = DTYPES[tensor.dtype], tensor.dim()
    shape, strides = tuple(cute.sym_int32() for _ in range(rank)), tuple(cute.sym_int64() for _ in range(rank))
    return make_fake_tensor(dtype, shape, strides, assumed_align=max(1, dtype.width // 8))


def everywhere(artifact, shape, info: Info, aux, scores: torch.Tensor | None = None) -> torch.Tensor:
    """What the compiled mod gives on shape (batch, heads, seqlen_q, seqlen_k), in the simulator."""
    out = torch.full(shape, float("nan"))
    with simulator.simulate():
        simulator.launch(artifact, (out, scores, info, tuple(aux)), outputs={"mO": out})
    return out


def in_torch(mod, shape, info: Info, aux, scores: torch.Tensor | None = None) -> torch.Tensor:
    """What the mod's twin gives there, called as the reference calls it."""
    head, q, k = torch.arange(shape[1])[:, None, None], torch.arange(shape[2])[:, None], torch.arange(shape[3])[None]
    results = []
    for batch in range(shape[0]):
        score = () if scores is None else (scores[batch],)
        result = mod.in_torch(*score, torch.tensor(batch), head, q, k, info, tuple(aux))
        assert result.dtype is (torch.bool if scores is None else torch.float32)
        results.append(result.expand(shape[1:]).float())
    return torch.stack(results)
