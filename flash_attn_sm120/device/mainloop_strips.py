"""A thread block whose warps have strips of two query groups: each brings its own Q, K and V come once for all."""

from __future__ import annotations

import math
from dataclasses import replace

import cutlass
from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.device.epilogue import stage_output, store_output
from flash_attn_sm120.device.load_cp_async import CpAsyncLoader
from flash_attn_sm120.device.mainloop import ForwardTile
from flash_attn_sm120.device.paged_kv import LANES, KeysAndValues, RowSource, Sharing, warps_that_copy
from flash_attn_sm120.device.ptx import lane_anew, thread_anew
from flash_attn_sm120.device.scheduler import Tile, read_blocks
from flash_attn_sm120.device.seqlen import Sequence, head_address
from flash_attn_sm120.device.strips import (
    Strip,
    Target,
    Way,
    read_start_k,
    read_strip,
    read_way,
    write_strip,
    write_way,
)
from flash_attn_sm120.device.visible import starts_at_first
from flash_attn_sm120.dispatch import STRIP_NOTE_BYTES


class KeyLoader(CpAsyncLoader):
    """K and V of one KV head; Q is no business of the loading warps."""

    def __init__(self, config, mK: cute.Tensor, mV: cute.Tensor, head_kv: Int32, seq_k: Sequence):
        """seq_k.length: keys that are needed."""
        self.config, self.inputs, self.seq_k = config, (mK, mV, head_kv), seq_k
        self.warps = warps_that_copy(config, RowSource)
        self.q_arrivals, self.arrivals = 1, LANES * self.warps
        self.keys = KeysAndValues(config, mK, mV, Int32(0), seq_k, head_kv, None, self.thread, self.warps)
        self.keys.bounds = (None, seq_k.length)

    def anew(self, start: Int32) -> KeyLoader:
        """The same; nothing that follows from the sequence's start holds a register from before it was read."""
        return KeyLoader(self.config, *self.inputs, replace(self.seq_k, start=start))


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

    def __init__(self, config, strip: Strip, batch: Int32, mQs: tuple, outputs: tuple, sink, numbers):
        """strip: the warp's. mQs: of both groups. outputs: (out, lse) likewise. sink: learnable_sink or None."""
        seq_k = Sequence(Int32(0), Int32(0), strip.seqlen_k, strip.seqlen_k)
        tile = Tile(Int32(0), strip.head, batch, cutlass.Boolean(True))
        super().__init__(config, tile, strip.seq_q, seq_k, strip.seqlen_k, sink, numbers, None)
        self.mQs, (self.mOs, self.mLSEs), self.strip = mQs, outputs, strip
        # masks and stores count from the block's first row, as if its warps had neighbouring rows
        self.first_row = strip.first_row - self.warp_row

    @property
    def note(self) -> Int32:
        """The warp's; from its number anew, as no register is to hold it through the products."""
        return self.shared + self.config.plan.note_offset + (thread_anew() >> 5) * STRIP_NOTE_BYTES

    @note.setter
    def note(self, address: Int32) -> None:
        """That of a block with one note isn't used."""

    @property
    def q_rows(self) -> Int32:
        """Where the warp's Q lies; likewise."""
        return self.q_rows_anew()

    @q_rows.setter
    def q_rows(self, address: Int32) -> None:
        """That of a block whose warps have a register for it isn't used."""

    @property
    def may_have_gap(self) -> bool:
        return not starts_at_first(self.config.problem)

    def way(self) -> Way:
        """From memory."""
        return read_way(self.way_note(), self.may_have_gap)

    def way_note(self) -> Int32:
        plan = self.config.plan
        return self.shared + plan.note_offset + plan.num_warps * STRIP_NOTE_BYTES

    def write_note(self, way: Way) -> None:
        write_way(self.way_note(), way, self.loader.seq_k.start)

    @cute.jit
    def start(self, way: Way):
        """Before the warps meet."""
        if self.warp < self.config.plan.num_warps:
            self.load_q()
            if self.lane == 0:
                write_strip(self.note, self.first_row, self.strip, self.target())
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

    def target(self) -> Target:
        strip = self.strip
        row = Int64(strip.first_row)
        out, row_stride = of_group(strip.group, self.mOs, strip.seq_q, strip.head)
        addresses, rooms = [], []
        for mLSE in self.mLSEs:
            line, first, room = strip.head, strip.seq_q.start, strip.seq_q.length
            if self.config.problem.padded_lse:
                line, first = self.tile.batch * self.mQs[0].shape[1] + strip.head, Int32(0)
                room = cutlass.min(room, mLSE.shape[1])
            offset = Int64(line) * Int64(mLSE.stride[0]) + Int64(first) + row
            addresses.append(mLSE.iterator.toint() + offset * 4)
            rooms.append(room)
        lse, lse_rows = (cutlass.select_(strip.group == 1, *of[::-1]) for of in (addresses, rooms))
        return Target(out + row * Int64(row_stride), row_stride, lse, lse_rows)

    @cute.jit
    def feed(self, way: Way):
        """A loading warp: each tile of K and V as soon as there is room for it; the first is on its way."""
        for i in cutlass.range(1, way.count, unroll=1):
            self.load(i, way)

    def load(self, i: Int32, way: Way) -> None:
        """The i-th block. Where the sequence's keys lie is read from memory for each tile: addresses that were held
        wouldn't fit a loading warp's registers."""
        for load in (KeyLoader.load_k, KeyLoader.load_v):
            loader = self.loader.anew(read_start_k(self.way_note()))
            load(loader, (self.way() if self.may_have_gap else way).number(i), self.stage(i))

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

    def accumulate(self, shared: Int32, n: Int32, i: Int32, masked: bool, modded: bool, place: None) -> None:
        super().accumulate(shared, self.way().number(i) if masked else n, i, masked, modded, place)

    def start_multiplying(self) -> None:
        """Waits for the warp's Q."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_warp()
        self.softmax.start(self.softmax_scale())
        self.slope = None
        if self.config.plan.q_in_registers:
            self.keep_q()

    def store(self, mOs: tuple, mLSEs: tuple) -> None:
        """The strip's rows, to where its note says."""
        config, thread = self.config, thread_anew()
        lane, warp_row = thread % 32, (thread >> 5) * config.warp_rows
        problem, layout = config.problem, config.layout_o
        first_row, head, seqlen_q, target = read_strip(self.note)
        row = first_row + warp_row
        constant = -0.5 * self.cap_scale if problem.softcap else 0.0
        sink = None
        if problem.sink:
            sink = Float32(self.modifiers[head]) * math.log2(math.e)
        factors, lses = self.softmax.finish(row + lane // 4, seqlen_q, constant, sink)
        shared = self.shared + warp_row * layout.row_bytes
        cute.arch.sync_warp()
        stage_output(layout, shared, self.tOrO, factors, lane, config.dtype)
        cute.arch.sync_warp()
        place = (target.out, target.row_stride, lane, seqlen_q - row)
        store_output(layout, shared, config.warp_rows, *place, problem.head_dim_v)
        self.store_lse(target.lse, lses, lane, target.lse_rows - row)

    @cute.jit
    def store_lse(self, address: Int64, lses: list, lane: Int32, rows_left: Int32):
        """lses: the thread's rows, 8 apart; four lanes hold the same rows and the first of them writes."""
        within = lane // 4
        if lane % 4 == 0:
            for r in cutlass.range_constexpr(len(lses)):
                if 8 * r + within < rows_left:
                    own = address + Int64(8 * r + within) * 4
                    pointer = cute.make_ptr(Float32, own, cute.AddressSpace.gmem, assumed_align=4)
                    cute.make_tensor(pointer, cute.make_layout(1))[0] = lses[r]
