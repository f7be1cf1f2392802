"""One Q tile against its KV blocks: loads, products and softmax in their order.

Warps of their own load; mbarriers say when a tile is full or free. Source of the roles: Shah et al., FlashAttention-3
(2024), section 3.1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import cutlass
from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.arguments import Modifiers, Numbers
from flash_attn_sm120.device.alibi import add_alibi
from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.dropout import Dropper, drop
from flash_attn_sm120.device.epilogue import stage_output, store_lse, store_output
from flash_attn_sm120.device.fp8_query import Q_SHIFT, load_query
from flash_attn_sm120.device.fragments import accumulators
from flash_attn_sm120.device.gemm import pv_product, qk_product
from flash_attn_sm120.device.mask import apply_bounds, apply_mask
from flash_attn_sm120.device.mods import Place, SeqlenInfo, apply_mask_mod, apply_score_mod
from flash_attn_sm120.device.ptx import (
    lane_anew,
    load_shared_f32,
    load_shared_v4,
    mbarrier_arrive_after,
    reciprocal,
    store_shared_f32,
    thread_anew,
)
from flash_attn_sm120.device.scheduler import (
    Positions,
    Tile,
    read_block_count,
    read_blocks,
    read_positions,
    read_tile_note,
    write_second_note,
    write_tile_note,
)
from flash_attn_sm120.device.seqlen import Sequence, head_address
from flash_attn_sm120.device.softmax import OnlineSoftmax, apply_softcap
from flash_attn_sm120.device.stage import Stage, stage_of
from flash_attn_sm120.device.tile import SharedMatrix
from flash_attn_sm120.device.visible import is_band, visible_columns
from flash_attn_sm120.dispatch import TILE_NOTE_BYTES

Q_COLUMNS_KEPT = 240  # in registers, where Q is; head_dim 256 leaves none for the rest
Q_COLUMNS_LESS = 32  # beside dropout's numbers
ROOMY = 180  # registers of a thread for O, S and Q that leave room for more
MATRIX_BARRIER, COPYING_BARRIER = 1, 2  # named barriers of the matrix warps and of those that copy


class ForwardTile:
    """State of a thread block while it works on (m_block, head, batch). `config` is the kernel class's static part."""

    def __init__(
        self,
        config,
        tile: Tile,
        seq_q: Sequence,
        seq_k: Sequence,
        total_k: Int32,
        modifiers: Modifiers,
        numbers: Numbers,
        heads_per_kv: Int32,
    ):
        """total_k: keys of all context-parallel ranks. numbers: as in_base_2 gives them, k_descale in softmax_scale."""
        self.config, self.tile, self.modifiers, self.numbers = config, tile, modifiers, numbers
        self.seq_q, self.seq_k, self.total_k, self.heads_per_kv = seq_q, seq_k, total_k, heads_per_kv
        problem, plan = config.problem, config.plan
        self.thread, _, _ = cute.arch.thread_idx()
        self.lane = cute.arch.lane_idx()
        self.warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        self.first_row = tile.m_block * plan.tile_m
        self.cap_scale = numbers.softcap
        self.window_left = numbers.window_left if problem.mask == "local" else None
        self.window_right = {"full": None, "causal": Int32(0), "local": numbers.window_right}[problem.mask]

        pointer = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)
        self.shared = pointer.toint()
        self.q_full = cute.recast_ptr(pointer + plan.barrier_offset, dtype=cutlass.Int64)
        self.warp_row = self.warp * config.warp_rows
        self.q_rows = self.shared + self.warp_row * config.layout_q.row_bytes
        self.note = self.shared + plan.note_offset
        self.second_note = self.note + TILE_NOTE_BYTES

        m_frags = config.warp_rows // 16
        self.scale = numbers.softmax_scale
        self.softmax = OnlineSoftmax(m_frags, problem.dropout or problem.biased)
        self.tSrS = accumulators(m_frags, plan.tile_n // 8)
        self.tOrO = accumulators(m_frags, config.layout_v.cols // 8)
        self.tOrO.fill(0.0)
        kept = self.q_columns_kept
        self.tSrQ = cute.make_rmem_tensor((m_frags, kept // 16, 4), Int32) if kept else None
        self.sQ: SharedMatrix | None = None  # of the block that is worked on, where find_q is called

    def softmax_scale(self) -> Float32:
        """What softmax multiplies scores by: 1 where they have got their scale before."""
        problem = self.config.problem
        if problem.rescored:
            return Float32(math.log2(math.e))
        return Float32(1.0) if problem.softcap or problem.alibi else self.scale

    def stage(self, i: int | Int32) -> Stage:
        """Of the i-th block."""
        return stage_of(i, self.config.plan.stages, self.config.stage_bytes, self.shared, self.q_full + 1)

    def write_note(self, blocks: BlockRange) -> None:
        write_tile_note(self.note, self.first_row, self.tile, self.seq_q, self.seq_k.length, self.total_k, blocks)
        if self.config.plan.note_bytes > TILE_NOTE_BYTES:
            write_second_note(self.second_note, self.seq_k.start, self.listed())
        self.write_factor()

    def write_factor(self) -> None:
        """v_descale of the head, so that no register holds the head's number for it."""
        plan, tile = self.config.plan, self.tile
        if plan.factor_bytes:
            factor = Float32(self.modifiers.v_descale[tile.batch, tile.head // self.heads_per_kv])
            store_shared_f32(self.shared + plan.factor_offset, [factor, factor])

    def v_factor(self, batch: Int32, head: Int32) -> Float32:
        plan = self.config.plan
        if plan.factor_bytes:
            return load_shared_f32(self.shared + plan.factor_offset, 2)[0]
        return self.modifiers.v_descale[batch, head // self.heads_per_kv]

    def listed(self) -> tuple[Int32, Int32, Int64, Int64]:
        """No lists; see SparseTile."""
        return Int32(0), Int32(0), Int64(0), Int64(0)

    def run(self, loader, blocks: BlockRange, mO: cute.Tensor, mLSE: cute.Tensor | None) -> None:
        """The whole tile; loader: a TmaLoader, a CpAsyncLoader or an Fp8Loader."""
        self.loader = loader
        self.start(blocks)
        self.play_role(blocks, mO, mLSE)

    @cute.jit
    def play_role(self, blocks: BlockRange, mO: cute.Tensor, mLSE: cute.Tensor | None):
        """The loading warps give their registers to the matrix warps."""
        plan = self.config.plan
        if self.warp >= plan.num_warps:
            if cutlass.const_expr(plan.hands_over_registers):
                cute.arch.setmaxregister_decrease(plan.loading_registers)
            if self.copies():
                if cutlass.const_expr(self.loader.converts):
                    self.loader.feed(self.stage(0))
                else:
                    self.feed(blocks)
        else:
            if cutlass.const_expr(plan.hands_over_registers):
                cute.arch.setmaxregister_increase(plan.matrix_registers)
            self.multiply_and_store(mO, mLSE)

    def multiply_and_store(self, mO: cute.Tensor, mLSE: cute.Tensor | None) -> None:
        """A matrix warp."""
        self.multiply()
        self.store(mO, mLSE)

    @cute.jit
    def start(self, blocks: BlockRange):
        """A loading warp makes the barriers, and those that copy start with it while the others get ready."""
        if self.warp == self.config.plan.num_warps:
            if self.lane == 0:
                self.init_barriers()
            cute.arch.mbarrier_init_fence()
            cute.arch.sync_warp()
        if self.copies():
            if cutlass.const_expr(self.loader.warps > 1):
                cute.arch.barrier(barrier_id=COPYING_BARRIER, number_of_threads=32 * self.loader.warps)
            if cutlass.const_expr(not self.config.loads_own_q):
                self.loader.load_q(self.q_full)
            self.load_first(blocks)
        if self.thread == 0:
            self.write_note(blocks)
        cute.arch.sync_threads()

    def init_barriers(self) -> None:
        cute.arch.mbarrier_init(self.q_full, self.q_arrivals)
        for stage in map(self.stage, range(self.config.plan.stages)):
            for name, barrier in stage.bars.items():
                full = name.endswith("full")
                count = self.loader.arrivals + self.notices(name) if full else self.config.plan.num_warps
                cute.arch.mbarrier_init(barrier, count)
        first = cute.recast_ptr(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024), dtype=cutlass.Int64)
        for i in range(self.config.plan.loader_barriers):
            cute.arch.mbarrier_init(first + (self.config.plan.loader_barrier_offset // 8 + i), 1)

    def notices(self, barrier: str) -> int:
        """Arrivals beside those of the loads."""
        return 0

    @property
    def q_arrivals(self) -> int:
        return self.loader.q_arrivals

    @cute.jit
    def load_first(self, blocks: BlockRange):
        """The first block is asked for before the thread block's warps have met, where the loader can do so."""
        if cutlass.const_expr(self.loader.starts_early):
            if blocks.begin < blocks.end:
                self.loader.begin(blocks, self.stage(0))

    def copies(self) -> cutlass.Boolean:
        """Whether the warp is one of those that copy."""
        first = self.config.plan.num_warps
        if self.loader.warps == 1:
            return self.warp == first
        return (self.warp >= first) & (self.warp < first + self.loader.warps)

    @cute.jit
    def feed(self, blocks: BlockRange):
        """A loading warp: each tile of K and V as soon as there is room for it."""
        if cutlass.const_expr(not self.loader.starts_early):
            if blocks.begin < blocks.end:
                self.loader.begin(blocks, self.stage(0))
        for i in cutlass.range(1 if self.loader.starts_early else 0, blocks.end - blocks.begin, unroll=1):
            n, stage = blocks.end - 1 - i, self.stage(i)
            self.loader.load_k(n, stage)
            self.loader.load_v(n, stage)

    @cute.jit
    def multiply(self):
        """A matrix warp: the main loop on what the loading warp brings. The range of blocks is read from memory each
        time, as no register is to hold it through the products."""
        self.start_multiplying()
        i, count = Int32(0), read_block_count(self.note)
        while i < self.count_anew(count):
            blocks, stage = read_blocks(self.note), self.stage(i)
            self.find_q()
            stage.wait_for_k()
            self.visit(blocks, blocks.end - 1 - i, i)
            i = i + 1
        self.stop_multiplying()

    @cute.jit
    def visit(self, blocks: BlockRange, n: Int32, i: Int32):
        """Block n, the i-th. ptxas gives the body that stands first the better registers."""
        if cutlass.const_expr(self.config.problem.mask == "full"):
            if (n < blocks.right_edge) & (n >= blocks.left_edge):
                self.block(n, i, False)
            else:
                self.visit_edge(n, i)
        else:
            if (n >= blocks.right_edge) | (n < blocks.left_edge):
                self.visit_edge(n, i)
            else:
                self.block(n, i, False)

    @cute.jit
    def visit_edge(self, n: Int32, i: Int32):
        """A block that needs a mask, for a warp that may see none of it."""
        if self.sees(n):
            self.block(n, i, True)
        else:
            self.skip(i)

    def start_multiplying(self) -> None:
        """Waits for Q."""
        if self.config.loads_own_q:
            self.load_own_q()
        else:
            cute.arch.mbarrier_wait(self.q_full, 0)
        self.take_q()

    def take_q(self) -> None:
        """What is to be done with Q before the first block."""
        self.softmax.start(self.softmax_scale())
        self.slope = self.load_slope() if self.config.problem.alibi else None
        if self.config.plan.q_in_registers:
            self.keep_q()
        if self.config.problem.dropout:
            self.dropper = self.make_dropper()

    def stop_multiplying(self) -> None:
        """O takes the place of the warp's Q, or, where it has another form, of what other warps may still read."""
        if self.config.layout_o != self.config.layout_q:
            cute.arch.barrier(barrier_id=MATRIX_BARRIER, number_of_threads=32 * self.config.plan.num_warps)

    @property
    def is_roomy(self) -> bool:
        """Whether O, S and Q leave registers for more."""
        return not self.fills_registers and self.config.plan.note_bytes == TILE_NOTE_BYTES

    @property
    def holds_q_place(self) -> bool:
        """Whether a register does."""
        plan = self.config.plan
        return not (self.config.problem.dropout and self.fills_registers) or plan.q_in_registers

    @property
    def q_columns_kept(self) -> int:
        """Of Q, in registers."""
        config = self.config
        if not config.plan.q_in_registers:
            return 0
        return min(config.layout_q.cols, Q_COLUMNS_KEPT) - (Q_COLUMNS_LESS if config.problem.dropout else 0)

    @property
    def fills_registers(self) -> bool:
        """Whether O, S and Q alone do."""
        config = self.config
        columns = config.layout_v.cols + config.plan.tile_n + self.q_columns_kept // 2
        return columns * config.warp_rows // 32 > ROOMY

    def count_anew(self, count: Int32) -> Int32:
        """Of blocks, from memory where the tile leaves it no register."""
        return count if self.is_roomy else read_block_count(self.note)

    def sees(self, n: Int32) -> cutlass.Boolean:
        """Whether any row of the warp sees any column of the block; a branch here costs nothing, unlike one inside."""
        visible = cutlass.Boolean(True)
        if self.config.problem.context_parallel:  # local columns say nothing of the distance
            return visible
        at = read_positions(self.note)
        diagonal = at.first_row + (thread_anew() >> 5) * self.config.warp_rows + at.shift
        if self.window_right is not None:
            visible = n * self.config.plan.tile_n <= diagonal + (self.config.warp_rows - 1) + self.window_right
        if self.window_left is not None:
            visible = visible & ((n + 1) * self.config.plan.tile_n > diagonal - self.window_left)
        return visible

    def arrive(self, barrier: cute.Pointer, results: cute.Tensor | None) -> None:
        """The warp is done with a tile, and one lane says so. results: the accumulators that its reads went into."""
        cute.arch.sync_warp()
        read = [] if results is None else self.all_reads(results)
        mbarrier_arrive_after(barrier.toint(), read, None if self.elects else Int32(self.lane == 0))

    def all_reads(self, results: cute.Tensor) -> list[Float32]:
        """Results that together wait for all reads of K or V: of each pair of blocks one, as a read serves two."""
        return [results[0, n, 0] for n in range(0, results.shape[1], 2)]

    @property
    def elects(self) -> bool:
        """Whether the chip chooses the lane that arrives, rather than lane 0: what that takes of ptxas' registers
        depends on the loop. Evidence: benchmarks/NOTES.md, "Softmax between the products"."""
        plan = self.config.plan
        changed = plan.note_bytes > TILE_NOTE_BYTES and not plan.persistent
        largest = self.fills_registers and not plan.q_in_registers
        return plan.hands_over_registers and (changed or (largest and self.config.problem.mask == "full"))

    def skip(self, i: Int32) -> None:
        """In place of block."""
        stage = self.stage(i)
        self.arrive(stage.bars["k_free"], None)
        stage.wait_for_v()
        self.arrive(stage.bars["v_free"], None)

    def keep_q(self) -> None:
        """Q in registers: reading it anew for each block would bind where a warp has 16 rows."""
        sQ = self.matrix_q()
        for m, c in itertools.product(*map(range, self.tSrQ.shape[:2])):
            for i, pair in enumerate(sQ.load(16 * m, 16 * c)):
                self.tSrQ[m, c, i] = pair

    def block(self, n: Int32, i: Int32, masked: bool, modded: bool = True) -> None:
        """Once K is there. masked: some of its places may not be seen; modded: mask_mod is asked."""
        stage = self.stage(i)
        problem = self.config.problem
        if problem.block_sparse and (masked or problem.modded or problem.alibi or problem.dropout):
            n = self.number_anew(i)
        place = self.place(n, masked) if problem.modded else None  # before the products, which hide it
        self.scores(stage.shared, self.bias(place) if problem.biased else None)
        self.arrive(stage.bars["k_free"], self.tSrS)
        self.look_ahead(i)
        stage.wait_for_v()
        self.accumulate(stage.shared, n, i, masked, modded, place)
        self.arrive(stage.bars["v_free"], self.tOrO)

    def look_ahead(self, i: Int32) -> None:
        """While block i is worked on: nothing, as the one before it comes next."""

    def scores(self, shared: Int32, bias: Callable | None) -> None:
        """bias: of the thread's part of the block, as Mod.bias returns it."""
        config = self.config
        sK = config.layout_k.matrix(shared, self.lane, config.offset_k, rows_first=False)
        qk_product(self.tSrQ, self.sQ or self.matrix_q(), sK, self.tSrS, config.mma_dtype, bias)

    def find_q(self) -> None:
        """Before the wait for K, where it has to be found anew, which takes a while."""
        self.sQ = None if self.holds_q_place else self.matrix_q()

    def q_rows_anew(self) -> Int32:
        """q_rows, where no register is to hold it."""
        config = self.config
        return self.shared + (thread_anew() >> 5) * (config.warp_rows * config.layout_q.row_bytes)

    def matrix_q(self) -> SharedMatrix:
        """The warp's rows."""
        if self.holds_q_place:
            return self.config.layout_q.matrix(self.q_rows, self.lane)
        return self.config.layout_q.matrix(self.q_rows_anew(), lane_anew())

    def accumulate(self, shared: Int32, n: Int32, i: Int32, masked: bool, modded: bool, place: Place | None) -> None:
        """place: for mods."""
        config = self.config
        if config.problem.softcap:
            apply_softcap(self.tSrS, self.scale, self.cap_scale)
        if config.problem.alibi:
            self.add_alibi(n)
        if place is not None:  # after the softcap, which makes a number of -inf
            self.apply_mods(place, modded)
        if masked:
            self.mask(n)
        if config.problem.dropout:
            tOrP = self.dropped(n, i, masked)
        else:
            softmax = self.softmax
            softmax.follow(self.tSrS, self.tOrO)
            probabilities = softmax.probabilities_at_once if config.problem.biased else softmax.probabilities
            tOrP = probabilities(self.tSrS, config.mma_dtype)
        sV = config.layout_v.matrix(shared, self.lane, config.offset_v)
        pv_product(sV, tOrP, self.tOrO, config.mma_dtype)

    def dropped(self, n: Int32, i: Int32, masked: bool) -> Iterator[list]:
        """What is left of P of block n. Its numbers are drawn beside the maxima, where a mask and f16, which takes more
        words to apply them, leave the registers for it."""
        plan, dtype, shape = self.config.plan, self.config.mma_dtype, self.tSrS.shape[:2]
        if not (plan.q_in_registers or self.fills_registers):  # else a stack is needed, here and there
            n = self.number_anew(i)
        found = None if masked and dtype == "f16" else self.dropper.draw(n * plan.tile_n, *shape)
        self.softmax.follow(self.tSrS, self.tOrO)
        found = found or self.dropper.draw(n * plan.tile_n, *shape)
        return drop(found, self.softmax.probabilities(self.tSrS, dtype), *shape, dtype)

    def number_anew(self, i: Int32) -> Int32:
        """Of the i-th block, from memory, so that no register holds it through the products."""
        return read_blocks(self.note).end - 1 - i

    def apply_mods(self, place: Place, modded: bool) -> None:
        problem, aux = self.config.problem, self.modifiers.aux or ()
        if problem.rescored:
            apply_score_mod(self.tSrS, problem.score_mod, self.scale, place, aux)
        if problem.mask_mod is not None and modded:
            apply_mask_mod(self.tSrS, problem.mask_mod, place, aux)

    def bias(self, place: Place) -> Callable:
        """Of the thread's scores, which get their scale from softmax."""
        unit, aux = reciprocal(self.scale) * math.log2(math.e), self.modifiers.aux or ()
        first_col = place.first_col + 2 * (place.lane % 4)
        return self.config.problem.score_mod.bias(
            unit, place.batch, place.head, place.first_row, first_col, place.info, aux
        )

    def place(self, n: Int32, masked: bool) -> Place:
        """Of the thread's part of block n. What mods read is read where rows and columns exist."""
        problem, plan, thread = self.config.problem, self.config.plan, thread_anew()
        first_row, head, batch, seq_q = read_tile_note(self.note, problem.packed_q)
        seqlen_k, (offset_k, _, _, _) = read_positions(self.note).seqlen_k, load_shared_v4(self.second_note)
        first = first_row + (thread >> 5) * self.config.warp_rows + ((thread % 32) >> 2)
        rows = [first + 8 * r for r in range(self.softmax.rows)]
        last_col = None
        if problem.aux:
            rows = [cutlass.min(row, seq_q.length - 1) for row in rows]
            last_col = seqlen_k - 1 if masked else None
        info = SeqlenInfo(seq_q.length, seqlen_k, seq_q.start, offset_k)
        return Place(batch, head, first, rows, n * plan.tile_n, thread % 32, info, last_col)

    def make_dropper(self) -> Dropper:
        """Of the thread's rows."""
        thread = thread_anew()
        row = self.first_row + (thread >> 5) * self.config.warp_rows
        return Dropper(self.modifiers.dropout, row, self.tile.head, self.tile.batch, thread % 32)

    def own_positions(self, at: Positions, thread: Int32) -> list[Int32]:
        """Of the thread's rows."""
        first = at.first_row + at.shift + (thread >> 5) * self.config.warp_rows + ((thread % 32) >> 2)
        return [first + 8 * r for r in range(self.softmax.rows)]

    def add_alibi(self, n: Int32) -> None:
        thread, problem, first_col = thread_anew(), self.config.problem, n * self.config.plan.tile_n
        scale = self.softmax_scale() if problem.softcap else self.scale
        positions = self.own_positions(read_positions(self.note), thread)
        slopes = [self.slope] * len(positions)
        add_alibi(problem, self.tSrS, scale, slopes, positions, first_col, thread % 32, self.numbers)

    def mask(self, n: Int32) -> None:
        problem, at, thread = self.config.problem, read_positions(self.note), thread_anew()
        first_col = n * self.config.plan.tile_n
        if is_band(problem):
            row = at.first_row + (thread >> 5) * self.config.warp_rows
            edges = (at.seqlen_k, at.shift, self.window_left, self.window_right)
            apply_mask(self.tSrS, row, first_col, thread % 32, *edges)
            return
        bounds = [
            visible_columns(problem, position, at.seqlen_k, at.total_k, self.numbers)
            for position in self.own_positions(at, thread)
        ]
        apply_bounds(self.tSrS, bounds, first_col, thread % 32)

    def load_slope(self) -> Float32:
        """In base 2."""
        _, head, batch, _ = read_tile_note(self.note, self.config.problem.packed_q)
        return self.modifiers.alibi_slopes[batch, head] * math.log2(math.e)

    def load_own_q(self) -> None:
        """The warp's rows, with k_descale where they become f16."""
        first_row, head, batch, seq_q = read_tile_note(self.note, self.config.problem.packed_q)
        config, factor = self.config, None
        if config.q_to_f16:
            factor = 2.0**-Q_SHIFT
            if config.problem.k_descale:
                factor = Float32(self.modifiers.k_descale[batch, head // self.heads_per_kv]) * factor
        first_row = first_row + (thread_anew() >> 5) * config.warp_rows
        load_query(self.loader.q, first_row, seq_q.length, self.q_rows, config.warp_rows, factor)

    def store(self, mO: cute.Tensor, mLSE: cute.Tensor | None) -> None:
        """Rows beyond the used length but inside the sequence's room become 0 and -inf."""
        config = self.config
        problem = config.problem
        first_row, head, batch, seq_q = read_tile_note(self.note, problem.packed_q)
        row = first_row + self.stored_row()
        constant = -0.5 * self.cap_scale if problem.softcap else 0.0
        sink = None
        if problem.sink:
            sink = Float32(self.modifiers.learnable_sink[head]) * math.log2(math.e)
        factors, lses = self.softmax.finish(row + self.lane // 4, seq_q.length, constant, sink)
        if problem.v_descale:
            descale = self.v_factor(batch, head)
            factors = [factor * descale for factor in factors]
        if problem.dropout:
            factors = [factor * self.modifiers.dropout.factor for factor in factors]
        address, stride = head_address(mO, seq_q, head, problem.packed_q)
        glob = address + Int64(row) * Int64(stride)
        rows_left = seq_q.room - row
        self.store_rows(factors, glob, stride, rows_left)
        if mLSE is not None:
            place = (head, batch, seq_q.start, row)
            store_lse(mLSE, problem.packed_q, *place, lses, self.lane, rows_left)

    def stored_row(self) -> Int32:
        """The warp's first in the tile, anew where ptxas makes 60 moves of holding it: in the plain kernel's largest
        tile."""
        config = self.config
        plan = config.plan
        if plan.kernel != "forward" or self.is_roomy or plan.q_in_registers or plan.note_bytes > TILE_NOTE_BYTES:
            return self.warp_row
        return (thread_anew() >> 5) * config.warp_rows

    def store_rows(self, factors: list[Float32], glob: Int64, stride: Int32, rows_left: Int32) -> None:
        """The warp's O, times `factors`, by way of shared memory; glob: of its first row."""
        config, layout = self.config, self.config.layout_o
        shared = self.shared + self.warp_row * layout.row_bytes
        cute.arch.sync_warp()
        stage_output(layout, shared, self.tOrO, factors, self.lane, config.dtype)
        cute.arch.sync_warp()
        cols = config.problem.head_dim_v
        store_output(layout, shared, config.warp_rows, glob, stride, self.lane, rows_left, cols)
