"""The products of a decode: every warp has all rows of Q, in registers, and a granule of keys in shared memory.

Two forms of operand: Keys16 reads 16-bit K and V with ldmatrix; device/fp8.py has its twin for 8-bit ones.
"""

from __future__ import annotations

from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.device.gemm import pv_product
from flash_attn_sm120.device.ptx import load_global_b32, load_shared_v4, mma_m16n8k16, store_shared_v4
from flash_attn_sm120.device.rows import VisibleRows

MIN_CHAINS = 4  # of products that wait for one another, so that mma.sync's latency overlaps


class ScoreSum:
    """Accumulators of S = Q K^T. The k steps are dealt out to several chains where the tile alone has few and registers
    are left."""

    def __init__(self, tSrS: cute.Tensor, k_steps: int):
        self.tSrS = tSrS
        self.m_frags, self.n_frags, _ = tSrS.shape
        self.chains = -(-MIN_CHAINS // (self.m_frags * self.n_frags)) if k_steps <= 12 else 1
        zeros = [Float32(0.0)] * 4
        self.acc = [
            [[list(zeros) for _ in range(self.n_frags)] for _ in range(self.m_frags)] for _ in range(self.chains)
        ]

    def add(self, k: int, n: int, tSrQ: list, tSrK: list, dtype: str) -> None:
        """tSrQ [m] -> A operand and tSrK, B operand of column block n, at k step k."""
        acc = self.acc[k % self.chains]
        for m in range(self.m_frags):
            acc[m][n] = mma_m16n8k16(tSrQ[m], tSrK, acc[m][n], dtype)

    def store(self) -> None:
        for m in range(self.m_frags):
            for n in range(self.n_frags):
                for i in range(4):
                    total = self.acc[0][m][n][i]
                    for chain in self.acc[1:]:
                        total = total + chain[m][n][i]
                    self.tSrS[m, n, i] = total


class HeldQ:
    """Q as A operands: in registers, but for the first k steps where those would be too few.

    ring: of the warp, behind whose tiles the lanes keep these, each its own.
    """

    def __init__(self, config, lane: Int32, ring: Int32):
        self.q_steps, self.shared_q = config.memory.q_steps, ring + config.memory.q_offset + lane * 16

    def keep(self, tSrQ: list) -> list:
        """tSrQ [k step][m] -> A operand; what take wants."""
        kept = min(self.q_steps, len(tSrQ))
        for k, step in enumerate(tSrQ[:kept]):
            for m, fragment in enumerate(step):
                store_shared_v4(self._place(k, m, len(step)), fragment)
        return [None] * kept + tSrQ[kept:]

    def take(self, tSrQ: list, k: int, m_frags: int) -> list:
        """[m] -> A operand of k step k."""
        if tSrQ[k] is not None:
            return tSrQ[k]
        return [load_shared_v4(self._place(k, m, m_frags)) for m in range(m_frags)]

    def _place(self, k: int, m: int, m_frags: int) -> Int32:
        return self.shared_q + (k * m_frags + m) * 512


class Keys16(HeldQ):
    """K and V of 16 bits, the dtype of q."""

    columns_together = 2  # of a lane's columns of O

    def __init__(self, config, lane: Int32, shared: Int32, ring: Int32):
        super().__init__(config, lane, ring)
        self.config, self.lane, self.dtype = config, lane, config.dtype
        self.quad = lane % 4

    def load_q(self, tile: VisibleRows) -> None:
        """Nothing: the first K and V are asked for first, as so many loads of Q would hold them up."""

    def prepare_q(self, tile: VisibleRows, loaded: None) -> list:
        """Starts the loads of the thread's rows: tSrQ [k step][m] -> A operand, as scores takes it; columns that don't
        exist are 0."""
        head_dim, tSrQ = self.config.problem.head_dim, []
        rows = [tile.q_address(row) for row in tile.own_rows]
        for col in range(0, self.config.layout_k.cols, 16):
            step = []
            for m in range(len(rows) // 2):
                own = [row + Int64(self.quad * 4) for row in rows[2 * m : 2 * m + 2]]
                step.append(
                    [
                        load_global_b32(row, 2 * (col + right)) if col + right < head_dim else Int32(0)
                        for right in (0, 8)
                        for row in own
                    ]
                )
            tSrQ.append(step)
        return self.keep(tSrQ)

    def scores(self, tSrQ: list, shared: Int32, tSrS: cute.Tensor) -> None:
        """tSrS = Q K^T"""
        sK = self.config.layout_k.matrix(shared, self.lane, rows_first=False)
        total = ScoreSum(tSrS, len(tSrQ))
        for k in range(len(tSrQ)):
            step = self.take(tSrQ, k, total.m_frags)
            for n in range(0, total.n_frags, 2):
                tSrK = sK.load(8 * n, 16 * k)
                for half in range(2):
                    total.add(k, n + half, step, tSrK[2 * half : 2 * half + 2], self.dtype)
        total.store()

    def accumulate(self, tOrP: list, shared: Int32, tOrO: cute.Tensor) -> None:
        """tOrO += P V"""
        pv_product(self.config.layout_v.matrix(shared, self.lane), tOrP, tOrO, self.dtype)

    def column(self, n: int, i: int) -> tuple[Int32, int]:
        """Column of out that value i of column block n of tOrO is: (of the lane, in addition)."""
        return self.quad * 2, 8 * n + i % 2

    @staticmethod
    def staged(col: Int32) -> Int32:
        """Byte of a row of O where column `col` is staged, on its way to the other warps."""
        return col * 4
