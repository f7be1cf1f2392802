"""Tiles through cp.async: mbarriers count the lanes of the copying warps as their copies land."""

from __future__ import annotations

from collections.abc import Callable

from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.paged_kv import LANES, KeysAndValues, RowSource, Sharing, warps_that_copy
from flash_attn_sm120.device.ptx import lane_anew, thread_anew
from flash_attn_sm120.device.scheduler import Tile
from flash_attn_sm120.device.seqlen import Sequence
from flash_attn_sm120.device.stage import Stage


class QueryLoader:
    """Brings the Q tile of (m_block, head, batch) to `shared`. warps: of the loading ones, those that copy."""

    converts = False  # whether it has a feed of its own, with what becomes of 8-bit tiles

    def __init__(self, config, mQ: cute.Tensor, shared: Int32, tile: Tile, seq_q: Sequence, warps: int):
        problem, layout = config.problem, config.layout_q
        self.warps, self.q_arrivals = warps, LANES * warps
        self.config, self.shared, self.tile, self.seq_q = config, shared, tile, seq_q
        self.sharing = Sharing(self.thread, LANES * warps, layout.units, layout.rows, neighbours=False)
        self.q = RowSource(mQ, layout, seq_q, tile.head, problem.packed_q, problem.head_dim)

    def thread(self) -> Int32:
        """Of those that copy; where one warp does, its lanes are all."""
        return lane_anew() if self.warps == 1 else thread_anew() - LANES * self.config.plan.num_warps

    def load_q(self, barrier: cute.Pointer) -> None:
        first_row = self.tile.m_block * self.config.plan.tile_m
        own = self.sharing.own()
        start = Int64(first_row + own.first) * self.q.row_stride
        self.q.load(own, self.shared, first_row, start, None, self.seq_q.length)
        cute.arch.cp_async_mbarrier_arrive_noinc(barrier)


class CpAsyncLoader(QueryLoader):
    """Q, and the tiles of its KV head, from tensors in any layout or from the pages of a pool."""

    starts_early = True  # begin may run before the block's warps have met, and load_k and load_v start one block on

    def __init__(
        self,
        config,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        shared: Int32,
        tile: Tile,
        seq_q: Sequence,
        seq_k: Sequence,
        lengths,
    ):
        super().__init__(config, mQ, shared, tile, seq_q, warps_that_copy(config, RowSource))
        self.arrivals = self.q_arrivals
        head_kv = tile.head // (mQ.shape[-2] // mK.shape[-2])
        self.keys = KeysAndValues(config, mK, mV, tile.batch, seq_k, head_kv, lengths, self.thread, self.warps)
        self.keys.bounds = (None, seq_k.length)

    def begin(self, blocks: BlockRange, stage: Stage) -> None:
        """Loads the last block, which alone may end in the middle."""
        page = self.keys.page_number(blocks.end - 1)
        self.keys.hold(page, page)
        n = blocks.end - 1
        self.keys.load_k(stage.shared + self.config.offset_k, n, self.keys.turn(n - 1))
        self.arrive_copied(stage.bars["k_full"])
        self.keys.load_v(stage.shared + self.config.offset_v, n, self.keys.held())
        self.arrive_copied(stage.bars["v_full"])

    def arrive_copied(self, barrier: cute.Pointer) -> None:
        """Each lane, when its copies have landed."""
        cute.arch.cp_async_mbarrier_arrive_noinc(barrier)

    def start_list(self, n: Int32) -> None:
        """n: the tile that load_listed is called with next."""
        page = self.keys.page_number(n)
        self.keys.hold(page, page)

    def load_listed(self, n: Int32, following: Int32, stage: Stage, told: Callable[[], None]) -> None:
        """K and V of tile n, each of which may go beyond the sequence; `following` comes next. told: what is to be done
        once K has room."""
        page = self.keys.turn(following)
        stage.wait_for_k_room()
        self.keys.load_k(stage.shared + self.config.offset_k, n, page)
        cute.arch.cp_async_mbarrier_arrive_noinc(stage.bars["k_full"])
        told()
        stage.wait_for_v_room()
        self.keys.load_v(stage.shared + self.config.offset_v, n, page)
        cute.arch.cp_async_mbarrier_arrive_noinc(stage.bars["v_full"])

    def load_k(self, n: Int32, stage: Stage) -> None:
        page = self.keys.turn(n - 1)
        self.keys.load_whole(self.keys.k, stage.shared + self.config.offset_k, n, page, stage.wait_for_k_room)
        cute.arch.cp_async_mbarrier_arrive_noinc(stage.bars["k_full"])

    def load_v(self, n: Int32, stage: Stage) -> None:
        page = self.keys.held()
        self.keys.load_whole(self.keys.v, stage.shared + self.config.offset_v, n, page, stage.wait_for_v_room)
        cute.arch.cp_async_mbarrier_arrive_noinc(stage.bars["v_full"])
