"""A thread block whose warps have strips of two query groups: each brings its own Q, K and V come once for all."""

from __future__ import annotations

import math

import cutlass
from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.device.epilogue import stage_output, store_output
from flash_attn_sm120.device.load_cp_async import CpAsyncLoader
from flash_attn_sm120.device.mainloop import ForwardTile
from flash_attn_sm120.device.paged_kv import LANES, KeysAndValues, RowSource, Sharing, warps_that_copy
from flash_attn_sm120.device.ptx import lane_anew, thread_anew
from flash_attn_sm120.device.scheduler import Tile, read_blocks, read_tile_note, write_tile_note
from flash_attn_sm120.device.seqlen import Sequence, head_address
from flash_attn_sm120.device.strips import Strip, Way, read_way, write_way
from flash_attn_sm120.device.visible import starts_at_first
from flash_attn_sm120.dispatch import TILE_NOTE_BYTES


class KeyLoader(CpAsyncLoader):
    """K and V of one KV head; Q is no business of the loading warps."""

    def __init__(self, config, mK: cute.Tensor, mV: cute.Tensor, head_kv: Int32, seq_k: Sequence):
        """seq_k.length: keys that are needed."""
        self.config = config
        self.warps = warps_that_copy(config, RowSource)
        self.q_arrivals, self.arrivals = 1, LANES * self.warps
        self.keys = KeysAndValues(config, mK, mV, Int32(0), seq_k, head_kv, None, self.thread, self.warps)
        self.keys.bounds = (None, seq_k.length)

    def load_q(self, barrier: cute.Pointer) -> None:
        """See StripTile.load_q."""


class RowsAt(RowSource):
    """Rows at an address that is only known at run time."""

    def __init__(self, layout, cols: int, element_bytes: int, address: Int64, row_stride: Int32):
        self.layout = layout
        self.row_bytes = cols * element_bytes
        self.address, self.row_stride, self.page_stride = address, Int64(row_stride), Int64(0)


def of_group(group: Int32, tensors: tuple, seq: Sequence, head: Int32) -> tuple[Int64, Int32]:
    """head_address in the group's tensor."""
    (zero, zero_stride), (one, one_stride) = (head_address(tensor, seq, head, True) for tensor in tensors)
    return cutlass.select_(group == 1, one, zero), cutlass.select_(group == 1, one_stride, zero_stride)


class StripTile(ForwardTile):
    """A ForwardTile whose warps have a strip each, and a note each about it."""

    def __init__(self, config, mQs: tuple, batch: Int32, strip: Strip, sink, numbers, heads_per_kv: Int32):
        """strip: the warp's."""
        seq_k = Sequence(Int32(0), Int32(0), strip.seqlen_k, strip.seqlen_k)
        # the note's batch says the group too
        tile = Tile(Int32(0), strip.head, 2 * batch + strip.group, cutlass.Boolean(True))
        super().__init__(config, tile, strip.seq_q, seq_k, strip.seqlen_k, sink, numbers, heads_per_kv)
        self.mQs, self.strip = mQs, strip
        # masks and stores count from the block's first row, as if its warps had neighbouring rows
        self.first_row = strip.first_row - self.warp_row

    @property
    def note(self) -> Int32:
        """The warp's; from its number anew, as no register is to hold it through the products."""
        return self.shared + self.config.plan.note_offset + (thread_anew() >> 5) * TILE_NOTE_BYTES

    @note.setter
    def note(self, address: Int32) -> None:
        """That of a block with one note isn't used."""

    @property
    def may_have_gap(self) -> bool:
        return not starts_at_first(self.config.problem)

    def way(self) -> Way:
        """From memory."""
        config = self.config
        shared = self.shared + config.plan.note_offset + config.plan.num_warps * TILE_NOTE_BYTES
        return read_way(shared, self.may_have_gap)

    def write_note(self, way: Way) -> None:
        config = self.config
        write_way(self.shared + config.plan.note_offset + config.plan.num_warps * TILE_NOTE_BYTES, way)

    @cute.jit
    def start(self, way: Way):
        """Before the warps meet."""
        if self.warp < self.config.plan.num_warps:
            self.load_q()
            if self.lane == 0:
                strip = self.strip
                own = (self.tile, self.seq_q, strip.seqlen_k, strip.seqlen_k, strip.blocks)
                write_tile_note(self.note, self.first_row, *own)
        ForwardTile.start(self, way)

    def load_q(self) -> None:
        """The warp's own rows; those beyond the sequence become zeros."""
        config, strip, layout = self.config, self.strip, self.config.layout_q
        sharing = Sharing(lane_anew, LANES, layout.units, config.warp_rows, neighbours=False)
        address, row_stride = of_group(strip.group, self.mQs, strip.seq_q, strip.head)
        element_bytes = self.mQs[0].element_type.width // 8
        source, own = RowsAt(layout, config.problem.head_dim, element_bytes, address, row_stride), sharing.own()
        start = Int64(strip.first_row + own.first) * source.row_stride
        source.load(own, self.q_rows, strip.first_row, start, None, strip.seq_q.length)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def feed(self, way: Way):
        """A loading warp: each tile of K and V as soon as there is room for it; the first is on its way."""
        for i in cutlass.range(1, way.count, unroll=1):
            n, stage = (self.way() if self.may_have_gap else way).number(i), self.stage(i)
            self.loader.load_k(n, stage)
            self.loader.load_v(n, stage)

    @cute.jit
    def multiply(self):
        """A matrix warp: the main loop over the blocks that some warp needs. What it needs itself is read from memory
        each time, as no register is to hold it through the products."""
        self.start_multiplying()
        i = Int32(0)
        while i < self.way().count:
            n, blocks, stage = self.way().number(i), read_blocks(self.note), self.stage(i)
            stage.wait_for_k()
            if (n >= blocks.right_edge) | (n < blocks.left_edge):
                if (n < blocks.end) & (n >= blocks.begin) & self.sees(n):
                    self.block(n, i, True)
                else:
                    self.skip(i)
            else:
                self.block(n, i, False)
            i = i + 1
        self.stop_multiplying()

    def start_multiplying(self) -> None:
        """Waits for the warp's Q."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_warp()
        self.softmax.start(self.softmax_scales())
        self.slope = None
        self.tSrQ = self.keep_q() if self.config.plan.q_in_registers else {}

    def store(self, mOs: tuple, mLSEs: tuple) -> None:
        """The strip's rows of its group's tensors."""
        config = self.config
        problem, layout = config.problem, config.layout_o
        first_row, head, batch_and_group, seq_q = read_tile_note(self.note, True)
        group, batch = batch_and_group & 1, batch_and_group >> 1
        row = first_row + self.warp_row
        constant = -0.5 * self.cap_scale if problem.softcap else 0.0
        sink = None
        if problem.sink:
            sink = Float32(self.modifiers[head]) * math.log2(math.e)
        factors, lses = self.softmax.finish(row + self.lane // 4, seq_q.length, constant, sink)
        shared = self.shared + self.warp_row * layout.row_bytes
        cute.arch.sync_warp()
        stage_output(layout, shared, self.tOrO, factors, self.lane, config.dtype)
        cute.arch.sync_warp()
        address, stride = of_group(group, mOs, seq_q, head)
        glob, rows_left = address + Int64(row) * Int64(stride), seq_q.length - row
        store_output(layout, shared, config.warp_rows, glob, stride, self.lane, rows_left, problem.head_dim_v)
        self.store_lse(mLSEs, group, head, batch, seq_q, row, lses)

    @cute.jit
    def store_lse(
        self, mLSEs: tuple, group: Int32, head: Int32, batch: Int32, seq_q: Sequence, row: Int32, lses: list
    ):
        """mLSEs: (heads, total_q), or padded, (batch * heads, rounded seqlen_q), of each group."""
        addresses, rooms = [], []
        for mLSE, mQ in zip(mLSEs, self.mQs, strict=True):
            line, first, room = head, seq_q.start + row, seq_q.length
            if cutlass.const_expr(self.config.problem.padded_lse):
                line, first, room = batch * mQ.shape[-2] + head, row, cutlass.min(room, mLSE.shape[1])
            addresses.append(mLSE.iterator.toint() + (Int64(line) * Int64(mLSE.stride[0]) + Int64(first)) * 4)
            rooms.append(room)
        is_one = group == 1
        address = cutlass.select_(is_one, addresses[1], addresses[0])
        rows_left = cutlass.select_(is_one, rooms[1], rooms[0]) - row
        within = self.lane // 4
        if self.lane % 4 == 0:
            for r in cutlass.range_constexpr(len(lses)):
                if 8 * r + within < rows_left:
                    own = address + Int64(8 * r + within) * 4
                    pointer = cute.make_ptr(Float32, own, cute.AddressSpace.gmem, assumed_align=4)
                    cute.make_tensor(pointer, cute.make_layout(1))[0] = lses[r]
