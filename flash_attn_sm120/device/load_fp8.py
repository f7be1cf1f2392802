"""Tiles of 8-bit K and V as f16: all loading warps read them into registers, a step ahead of the products, convert them
and store them as the matrix warps want them."""

from __future__ import annotations

from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.fp8 import KINDS
from flash_attn_sm120.device.load_cp_async import QueryLoader
from flash_attn_sm120.device.paged_kv import KeysAndValues, RowSource, Sharing, ThreadRows, warps_that_copy
from flash_attn_sm120.device.ptx import fp8_to_f16, lane_anew, load_global_v4_if, store_shared_v4
from flash_attn_sm120.device.scheduler import Tile
from flash_attn_sm120.device.seqlen import Sequence
from flash_attn_sm120.device.tile import VECTOR

WORDS = 4  # of a load: 16 columns
BATCH = 2  # loads of a thread that are in flight together


class Fp8Rows(RowSource):
    """RowSource for 8-bit rows that become 16-bit ones; a load fills two units side by side."""

    units_a_load = 2

    def loads(self, sharing: Sharing) -> list[tuple[int, int]]:
        """(row of the thread's, first unit) of each load of a tile."""
        step = sharing.width * self.units_a_load
        return [(i, unit) for i in range(sharing.count) for unit in range(0, self.layout.cols // VECTOR, step)]

    def fetch(self, own: ThreadRows, place: tuple[int, int], first_row: Int32, start: Int64, end: Int32) -> list[Int32]:
        """Starts a load; zeros, and nothing read, from row `end` on and where the tensor has no columns."""
        i, first_unit = place
        first_byte = first_unit * VECTOR
        address = self.address + start + Int64(own.unit * 16) + i * (own.step * self.row_stride) + first_byte
        exists = first_row + own.first + i * own.step < end
        if first_byte + own.width * 16 > self.row_bytes:
            exists = exists & (first_byte + own.unit * 16 < self.row_bytes)
        return load_global_v4_if(address, Int32(exists))

    def store(self, own: ThreadRows, place: tuple[int, int], shared: Int32, words: list[Int32], kind: str) -> None:
        i, first_unit = place
        chunk, unit = divmod(first_unit, self.layout.units)
        for half in range(2):
            pairs = [pair for word in words[2 * half : 2 * half + 2] for pair in fp8_to_f16(word, kind)]
            offset = own.offset(self.layout, i, unit + 2 * own.unit + half)
            store_shared_v4(shared + (offset + chunk * self.layout.chunk_bytes), pairs)


class Fp8Loader(QueryLoader):
    """Q, and the tiles of its KV head, from tensors in any layout or from the pages of a pool."""

    starts_early = False

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
        super().__init__(config, mQ, shared, tile, seq_q, warps_that_copy(config, Fp8Rows))
        self.arrivals = self.warps
        self.kind = KINDS[config.problem.kv_dtype]
        head_kv = tile.head // (mQ.shape[-2] // mK.shape[-2])
        place = (tile.batch, seq_k, head_kv, lengths, self.thread, self.warps)
        self.keys = KeysAndValues(config, mK, mV, *place, source=Fp8Rows)
        self.length = seq_k.length
        self.words = cute.make_rmem_tensor((BATCH * WORDS,), Int32)  # on their way: the next loads that are stored
        self.first_block = None

    def begin(self, blocks: BlockRange) -> None:
        """Before the first load, of the last block."""
        self.first_block = blocks.begin
        page = self.keys.page_number(blocks.end - 1)
        self.keys.hold(page, page)
        self._fetch_k(blocks.end - 1)

    def load_k(self, n: Int32, barrier: cute.Pointer) -> None:
        self._load(self.keys.k, n, self.config.offset_k, barrier, self._fetch_v)

    def load_v(self, n: Int32, barrier: cute.Pointer) -> None:
        self._load(self.keys.v, n, self.config.offset_v, barrier, self._fetch_next_k)

    def _load(self, source: Fp8Rows, n: Int32, offset: int, barrier: cute.Pointer, fetch_next) -> None:
        """Stores a tile whose first loads are on their way. fetch_next(n) starts the first ones of the tile after it,
        before the last of this one are waited for."""
        loads, own = source.loads(self.keys.sharing), self.keys.sharing.own()
        for first in range(0, len(loads), BATCH):
            words = [self.words[i] for i in range(BATCH * WORDS)]
            if first + BATCH < len(loads):
                self._fetch(source, n, first + BATCH)
            else:
                fetch_next(n)
            for i, place in enumerate(loads[first : first + BATCH]):
                source.store(own, place, self.shared + offset, words[WORDS * i : WORDS * (i + 1)], self.kind)
        cute.arch.sync_warp()
        self._arrive(barrier)

    @cute.jit
    def _arrive(self, barrier: cute.Pointer):
        if lane_anew() == 0:
            cute.arch.mbarrier_arrive(barrier)

    def _fetch(self, source: Fp8Rows, n: Int32, first: int) -> None:
        own = self.keys.sharing.own()
        start = self.keys.start(source, own, n, self.keys.held())
        for i, place in enumerate(source.loads(self.keys.sharing)[first : first + BATCH]):
            words = source.fetch(own, place, n * self.keys.tile_n, start, self.length)
            for j, word in enumerate(words):
                self.words[WORDS * i + j] = word

    def _fetch_k(self, n: Int32) -> None:
        self.keys.turn(n - 1)
        self._fetch(self.keys.k, n, 0)

    def _fetch_v(self, n: Int32) -> None:
        self._fetch(self.keys.v, n, 0)

    @cute.jit
    def _fetch_next_k(self, n: Int32):
        if n > self.first_block:
            self._fetch_k(n - 1)
