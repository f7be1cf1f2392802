"""Tiles of 8-bit K and V as f16: all loading warps read them into registers, a step ahead of the products, convert them
and store them as the matrix warps want them."""

from __future__ import annotations

from cutlass import Boolean, Int32, Int64, cute

from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.fp8 import KINDS
from flash_attn_sm120.device.load_cp_async import QueryLoader
from flash_attn_sm120.device.paged_kv import KeysAndValues, RowSource, Sharing, ThreadRows, warps_that_copy
from flash_attn_sm120.device.ptx import fp8_to_f16, lane_anew, load_global_v4_if, store_shared_v4
from flash_attn_sm120.device.scheduler import Tile
from flash_attn_sm120.device.seqlen import Sequence
from flash_attn_sm120.device.stage import Stage
from flash_attn_sm120.device.tile import VECTOR

WORDS = 4  # of a load: 16 columns
IN_FLIGHT = 2  # loads of a thread at a time


class Fp8Rows(RowSource):
    """RowSource for 8-bit rows that become 16-bit ones; a load fills two units side by side."""

    units_a_load = 2

    def loads(self, sharing: Sharing) -> list[tuple[int, int]]:
        """(row of the thread's, first unit) of each load of a tile."""
        step = sharing.width * self.units_a_load
        return [(i, unit) for i in range(sharing.count) for unit in range(0, self.layout.cols // VECTOR, step)]

    def fetch(
        self,
        own: ThreadRows,
        place: tuple[int, int],
        first_row: Int32,
        start: Int64,
        end: Int32,
        needed: Boolean | None,
    ) -> list[Int32]:
        """Starts a load; zeros, and nothing read, where it isn't needed, from row `end` on, and where the tensor has no
        columns."""
        i, first_unit = place
        first_byte = first_unit * VECTOR
        address = self.address + start + Int64(own.unit * 16) + i * (own.step * self.row_stride) + first_byte
        exists = self.inside(first_row + own.first + i * own.step, None, end)
        if needed is not None:
            exists = exists & needed
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


class PendingTile:
    """What a thread loads of tile n of K or V; nothing where it isn't needed. Addresses are worked out with the first
    load and not before, so that they take no registers from the tile before it."""

    def __init__(
        self, keys: KeysAndValues, source: Fp8Rows, n: Int32, page: Int32 | None, needed: Boolean | None = None
    ):
        self.keys, self.source, self.n, self.page, self.needed = keys, source, n, page, needed
        self.places = source.loads(keys.sharing)
        self.own = self.start = None

    def fetch(self, i: int) -> list[Int32]:
        keys = self.keys
        if self.own is None:
            self.own = keys.sharing.own()
            self.start = keys.start(self.source, self.own, self.n, self.page)
        first_row, end = self.n * keys.tile_n, keys.bounds[1]
        return self.source.fetch(self.own, self.places[i], first_row, self.start, end, self.needed)


class Fp8Loader(QueryLoader):
    """The tiles of Q's KV head, from tensors in any layout or from the pages of a pool."""

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
        self.keys.bounds = (None, seq_k.length)
        # Loads 0, 1, ... of the tile that is stored next, and the page of the last that was started.
        self.slots, self.page = (cute.make_rmem_tensor((size,), Int32) for size in (IN_FLIGHT * WORDS, 1))
        self.first_block = None

    def begin(self, blocks: BlockRange, stage: Stage) -> None:
        """Starts the first loads, of the last block."""
        self.first_block = blocks.begin
        self._turn(blocks.end - 1)
        first = self._tile(self.keys.k, blocks.end - 1)
        for slot in range(min(IN_FLIGHT, len(first.places))):
            self._fetch(first, slot, slot)

    def load_k(self, n: Int32, stage: Stage) -> None:
        k, v = (self._tile(source, n) for source in (self.keys.k, self.keys.v))
        stage.wait_for_k_room()
        self._load(k, v, stage.shared + self.config.offset_k, stage.bars["k_full"])
        if len(v.places) <= IN_FLIGHT:
            self._turn(n - 1)

    def load_v(self, n: Int32, stage: Stage) -> None:
        v = self._tile(self.keys.v, n)
        if len(v.places) > IN_FLIGHT:
            self._turn(n - 1)
        k = self._tile(self.keys.k, n - 1, n > self.first_block)
        stage.wait_for_v_room()
        self._load(v, k, stage.shared + self.config.offset_v, stage.bars["v_full"])

    def _turn(self, n: Int32) -> None:
        """Looks up the page of the thread's rows of tile n."""
        if self.keys.page_size:
            self.page[0] = self.keys.page_number(n)

    def _tile(self, source: Fp8Rows, n: Int32, needed: Boolean | None = None) -> PendingTile:
        page = self.page[0] if self.keys.page_size else None
        return PendingTile(self.keys, source, n, page, needed)

    def _load(self, tile: PendingTile, after: PendingTile, shared: Int32, barrier: cute.Pointer) -> None:
        """Stores `tile`, whose first loads are on their way. A slot that is stored takes a later load of the tile, or a
        first one of the tile after."""
        count, own = len(tile.places), self.keys.sharing.own()
        for i in range(max(count, IN_FLIGHT)):
            slot = i % IN_FLIGHT
            if i < count:
                words = [self.slots[slot * WORDS + j] for j in range(WORDS)]
                tile.source.store(own, tile.places[i], shared, words, self.kind)
            if i + IN_FLIGHT < count:
                self._fetch(tile, i + IN_FLIGHT, slot)
            elif slot < len(after.places):
                self._fetch(after, slot, slot)
        cute.arch.sync_warp()
        self._arrive(barrier)

    @cute.jit
    def _arrive(self, barrier: cute.Pointer):
        if lane_anew() == 0:
            cute.arch.mbarrier_arrive(barrier)

    def _fetch(self, tile: PendingTile, i: int, slot: int) -> None:
        for j, word in enumerate(tile.fetch(i)):
            self.slots[slot * WORDS + j] = word
