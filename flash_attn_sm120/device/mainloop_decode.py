"""The rows of one KV head against a part of its keys. The warps of a block share the keys out among themselves.

A warp has a ring of its own in shared memory and waits for nobody: it loads granules of keys, in turn a tile of K and
one of V, each into the place of the one that it has just read, and keeps its own statistics and its own O for all rows.
They are merged at the end.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute

from flash_attn_sm120.device.fragments import accumulators
from flash_attn_sm120.device.paged_kv import KeysAndValues
from flash_attn_sm120.device.ptx import fma
from flash_attn_sm120.device.rows import VisibleRows
from flash_attn_sm120.device.softmax import OnlineSoftmax, apply_softcap, quad_reduce


class DecodeLoop:
    """A warp's way through its granules: first, first + step, ..., `count` of them."""

    def __init__(self, config, keys: KeysAndValues, shared: Int32, warp: Int32, score_scale: Float32, numbers):
        """shared: of the block."""
        problem, plan = config.problem, config.plan
        self.config, self.rows, self.keys, self.numbers = config, None, keys, numbers
        self.lane = cute.arch.lane_idx()
        self.shared = shared + warp * config.memory.ring_bytes
        self.ahead = plan.stages - 1
        self.operands = config.operands(self.lane, shared, self.shared)
        self.scale = score_scale
        self.softmax = OnlineSoftmax(plan.tile_m // 16)
        self.softmax.start(Float32(1.0) if problem.softcap or problem.alibi else score_scale)
        self.tSrS = accumulators(plan.tile_m // 16, plan.tile_n // 8)
        self.tOrO = accumulators(plan.tile_m // 16, config.memory.columns_out // 8)
        self.tOrO.fill(0.0)
        # Where the tile that comes next lies in the ring, and the one before, which has been read.
        self.slot = cute.make_rmem_tensor((2,), Int32)
        self.slot[0], self.slot[1] = Int32(0), Int32(self.ahead * config.slot_bytes)

    def first_pages(self, first: Int32, step: int) -> list:
        """Page numbers of the granules that are loaded before the first is multiplied, and of the next."""
        return [self.keys.page_number(first + i * step) for i in range((self.ahead + 1) // 2 + 1)]

    @cute.jit
    def run(
        self,
        rows: VisibleRows,
        pages: cutlass.Constexpr,
        first: Int32,
        step: cutlass.Constexpr,
        count: Int32,
        modifiers,
    ):
        """pages: first_pages(first, step)."""
        self.rows = rows
        loaded_q = self.operands.load_q(rows)
        if count > 0:
            self.start(pages, first, step, count)
        tSrQ = self.operands.prepare_q(rows, loaded_q)  # for which warps without granules are needed too
        if count > 0:
            self.rows.prepare(modifiers)
            for i in cutlass.range(count, unroll=1):
                self.granule(first, step, i, count, tSrQ)
            cute.arch.cp_async_wait_group(0)

    @cute.jit
    def start(self, pages: cutlass.Constexpr, first: Int32, step: cutlass.Constexpr, count: Int32):
        """The first `ahead` tiles."""
        for h in cutlass.range_constexpr(self.ahead):
            if h // 2 < count:
                self.load(first + h // 2 * step, h % 2, self.shared + h * self.config.slot_bytes, pages[h // 2])
            cute.arch.cp_async_commit_group()
        self.keys.hold(*pages[-2:])

    def load(self, granule: Int32, is_v: int, shared: Int32, page: Int32 | None) -> None:
        (self.keys.load_v if is_v else self.keys.load_k)(shared, granule, page)

    @cute.jit
    def granule(self, first: Int32, step: cutlass.Constexpr, i: Int32, count: Int32, tSrQ: cutlass.Constexpr):
        config, n = self.config, first + i * step
        self.turn(first, step, i, count, 0)
        self.wait()
        self.operands.scores(tSrQ, self.shared + self.slot[1], self.tSrS)
        self.turn(first, step, i, count, 1)
        self.modify(n)
        self.softmax.follow(self.tSrS, self.tOrO)
        tOrP = self.softmax.probabilities(self.tSrS, config.p_dtype)
        self.wait()
        self.operands.accumulate(tOrP, self.shared + self.slot[1], self.tOrO)

    def wait(self) -> None:
        """For the tile at slot[1]."""
        cute.arch.cp_async_wait_group(self.ahead)
        cute.arch.sync_warp()

    @cute.jit
    def turn(self, first: Int32, step: cutlass.Constexpr, i: Int32, count: Int32, is_v: cutlass.Constexpr):
        """Starts a load into the place of the tile that has been read; the next one is at slot[1] then."""
        config = self.config
        cute.arch.sync_warp()
        target = self.shared + self.slot[1]
        loaded = is_v + self.ahead  # tiles after granule i's K
        j = i + loaded // 2
        if cutlass.const_expr(loaded % 2 == 0):
            if j < count:
                granule = first + j * step
                self.load(granule, 0, target, self.keys.turn(granule + step))
        else:
            if j < count:
                self.load(first + j * step, 1, target, self.keys.held())
        cute.arch.cp_async_commit_group()
        here = self.slot[0]
        self.slot[1] = here
        last = self.ahead * config.slot_bytes
        self.slot[0] = cutlass.select_(here == last, Int32(0), here + config.slot_bytes)

    @cute.jit
    def modify(self, n: Int32):
        """Scale, softcap, ALiBi and mask of the scores of granule n."""
        config = self.config
        problem = config.problem
        if cutlass.const_expr(problem.softcap):
            apply_softcap(self.tSrS, self.scale, self.numbers.softcap)
        first_col = n * config.plan.tile_n
        if cutlass.const_expr(problem.alibi):
            scale = self.softmax.scale if problem.softcap else self.scale
            self.rows.add_alibi(self.tSrS, scale, first_col, self.lane, self.numbers)
        if (first_col < self.rows.inner_begin) | (first_col + config.plan.tile_n > self.rows.inner_end):
            self.rows.mask(self.tSrS, first_col, self.lane)

    def statistics(self) -> list[tuple[Float32, Float32]]:
        """(maximum in base 2, sum of the exponentials above it) of each of the thread's rows."""
        constant = -0.5 * self.numbers.softcap if self.config.problem.softcap else Float32(0.0)
        return [
            (
                fma(self.softmax.row_max[r], self.softmax.scale, constant),
                quad_reduce(self.softmax.row_sum[r], lambda a, b: a + b),
            )
            for r in range(self.softmax.rows)
        ]
