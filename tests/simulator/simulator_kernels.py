"""Two kernels that have nothing to do with attention: a tiled matrix product and a tensor copy with mbarriers."""

import functools

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

OPTIONS = "--gpu-arch sm_120a --enable-tvm-ffi --keep-ptx --generate-line-info"


class MatrixProduct:
    """C (m, n) = A (m, k) @ B (n, k)^T: cp.async in three stages, ldmatrix, mma.sync; four warps; ragged m and n."""

    tile_m, tile_n, tile_k, stages, threads = 64, 64, 32, 3, 128

    @cute.jit
    def __call__(self, mA: cute.Tensor, mB: cute.Tensor, mC: cute.Tensor, stream):
        dtype = mA.element_type
        inner = cute.make_layout((8, self.tile_k), stride=(self.tile_k, 1))
        atom = cute.make_composed_layout(cute.make_swizzle(2, 3, 3), 0, inner)
        sA_layout = cute.tile_to_shape(atom, (self.tile_m, self.tile_k, self.stages), (0, 1, 2))
        sB_layout = cute.tile_to_shape(atom, (self.tile_n, self.tile_k, self.stages), (0, 1, 2))
        operation = warp.MmaF16BF16Op(dtype, Float32, (16, 8, 16))
        mma = cute.make_tiled_mma(operation, (2, 2, 1), permutation_mnk=(32, 32, 16))
        load = cute.make_copy_atom(cpasync.CopyG2SOp(), dtype, num_bits_per_copy=128)
        copy = cute.make_tiled_copy_tv(load, cute.make_layout((32, 4), stride=(4, 1)), cute.make_layout((1, 8)))
        grid = (cute.ceil_div(mC.shape[0], self.tile_m), cute.ceil_div(mC.shape[1], self.tile_n), 1)
        self.kernel(mA, mB, mC, mma, sA_layout, sB_layout, copy).launch(
            grid=grid, block=(self.threads, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mA: cute.Tensor,
        mB: cute.Tensor,
        mC: cute.Tensor,
        mma: cute.TiledMma,
        sA_layout: cute.ComposedLayout,
        sB_layout: cute.ComposedLayout,
        copy: cute.TiledCopy,
    ):
        dtype = mA.element_type
        thread, _, _ = cute.arch.thread_idx()
        m_block, n_block, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        sA = smem.allocate_tensor(dtype, sA_layout, 1024)
        sB = smem.allocate_tensor(dtype, sB_layout, 1024)
        tiles = ((mA, sA, m_block, self.tile_m), (mB, sB, n_block, self.tile_n))
        part = copy.get_slice(thread)
        g, s, c = [], [], []
        for m, smem_tile, block, rows in tiles:
            identity = cute.make_identity_tensor(m.shape)
            g.append(part.partition_S(cute.local_tile(m, (rows, self.tile_k), (block, None))))
            s.append(part.partition_D(smem_tile))
            c.append(part.partition_S(cute.local_tile(identity, (rows, self.tile_k), (block, None))))
        k_tiles = cute.ceil_div(mA.shape[1], self.tile_k)
        for stage in cutlass.range_constexpr(self.stages - 1):
            if stage < k_tiles:
                self.load(copy, g[0], s[0], c[0], mA.shape, stage, stage)
                self.load(copy, g[1], s[1], c[1], mB.shape, stage, stage)
            cute.arch.cp_async_commit_group()
        mine = mma.get_slice(thread)
        rA = mine.make_fragment_A(mine.partition_A(sA[None, None, 0]))
        rB = mine.make_fragment_B(mine.partition_B(sB[None, None, 0]))
        acc = cute.make_rmem_tensor(mma.partition_shape_C((self.tile_m, self.tile_n)), Float32)
        acc.fill(0.0)
        matrices = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), dtype)
        copy_a, copy_b = cute.make_tiled_copy_A(matrices, mma), cute.make_tiled_copy_B(matrices, mma)
        tsA, trA = copy_a.get_slice(thread).partition_S(sA), copy_a.get_slice(thread).retile(rA)
        tsB, trB = copy_b.get_slice(thread).partition_S(sB), copy_b.get_slice(thread).retile(rB)
        stage = Int32(0)
        for k in cutlass.range(k_tiles, unroll=1):
            cute.arch.cp_async_wait_group(self.stages - 2)
            cute.arch.sync_threads()
            ahead = k + self.stages - 1
            if ahead < k_tiles:
                target = (stage + self.stages - 1) % self.stages
                self.load(copy, g[0], s[0], c[0], mA.shape, ahead, target)
                self.load(copy, g[1], s[1], c[1], mB.shape, ahead, target)
            cute.arch.cp_async_commit_group()
            for i in cutlass.range_constexpr(cute.size(rA, mode=[2])):
                cute.copy(copy_a, tsA[None, None, i, stage], trA[None, None, i])
                cute.copy(copy_b, tsB[None, None, i, stage], trB[None, None, i])
                cute.gemm(mma, acc, rA[None, None, i], rB[None, None, i], acc)
            stage = (stage + 1) % self.stages
        tile = (self.tile_m, self.tile_n)
        gC = mine.partition_C(cute.local_tile(mC, tile, (m_block, n_block)))
        cC = mine.partition_C(cute.local_tile(cute.make_identity_tensor(mC.shape), tile, (m_block, n_block)))
        for i in cutlass.range_constexpr(cute.size(acc)):
            if cute.elem_less(cC[i], mC.shape):
                gC[i] = acc[i].to(mC.element_type)

    @cute.jit
    def load(self, copy, g, s, c, shape, k, stage):
        for i in cutlass.range_constexpr(cute.size(s, mode=[1])):
            inside = cute.make_rmem_tensor((1,), cutlass.Boolean)
            inside[0] = cute.elem_less(c[0, i, 0, k], shape)
            cute.copy(copy, g[None, i, None, k], s[None, i, None, stage], pred=inside)


class TensorCopy:
    """out = 2 * in over (rows, cols) bf16: warp 0 issues tensor loads, warp 1 doubles and issues tensor stores."""

    rows, stages = 32, 2

    def __init__(self, swizzle: int):
        # 1, 2, 3: 32, 64, 128 bytes.
        self.swizzle = swizzle
        self.cols = 8 << swizzle

    @cute.jit
    def __call__(self, mI: cute.Tensor, mO: cute.Tensor, stream):
        self.dtype = mI.element_type
        tile = (self.rows, self.cols)
        layout = cute.make_layout(tile, stride=(self.cols, 1))
        s_layout = cute.make_composed_layout(cute.make_swizzle(self.swizzle, 4, 3), 0, layout)
        load, gI = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), mI, s_layout, tile)
        store, gO = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), mO, s_layout, tile)
        grid = (cute.ceil_div(mI.shape[0], self.rows), 1, 1)
        self.kernel(load, gI, store, gO).launch(grid=grid, block=(64, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, load: cute.CopyAtom, gI: cute.Tensor, store: cute.CopyAtom, gO: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        role = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = cutlass.memory.SmemAllocator()
        full = smem.allocate_array(Int64, self.stages)
        empty = smem.allocate_array(Int64, self.stages)
        tile, swizzle = (self.rows, self.cols), cute.make_swizzle(self.swizzle, 4, 3)
        staged = cute.make_layout((*tile, self.stages), stride=(self.cols, 1, self.rows * self.cols))
        sI = smem.allocate_tensor(self.dtype, staged, 1024, swizzle=swizzle)
        sO = smem.allocate_tensor(self.dtype, cute.make_layout(tile, stride=(self.cols, 1)), 1024, swizzle=swizzle)
        if thread == 0:
            for i in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(full + i, 1)
                cute.arch.mbarrier_init(empty + i, 32)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        tI, tO = (cute.local_tile(g, tile, (block, None)) for g in (gI, gO))
        one = cute.make_layout(1)
        sI_part, gI_part = cpasync.tma_partition(load, 0, one, cute.group_modes(sI, 0, 2), cute.group_modes(tI, 0, 2))
        sO_part, gO_part = cpasync.tma_partition(store, 0, one, cute.group_modes(sO, 0, 2), cute.group_modes(tO, 0, 2))
        count = cute.size(tI, mode=[2])
        if role == 0:
            for k in cutlass.range(count, unroll=1):
                stage, phase = k % self.stages, (k // self.stages) & 1
                cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.rows * self.cols * 2)
                cute.copy(load, gI_part[None, k], sI_part[None, stage], tma_bar_ptr=full + stage)
        else:
            lane = thread - 32
            for k in cutlass.range(count, unroll=1):
                stage, phase = k % self.stages, (k // self.stages) & 1
                cute.arch.mbarrier_wait(full + stage, phase)
                for col in cutlass.range(self.cols, unroll_full=True):
                    sO[lane, col] = (sI[lane, col, stage].to(Float32) * 2.0).to(self.dtype)
                cute.arch.mbarrier_arrive(empty + stage)
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_warp()
                cute.copy(store, sO_part, gO_part[None, k])
                cute.arch.cp_async_bulk_commit_group()
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                cute.arch.sync_warp()


def _matrix(dtype, shape, divisibility=8):
    return make_fake_tensor(dtype, shape, stride=(cute.sym_int64(divisibility=divisibility), 1), assumed_align=16)


@functools.cache
def matrix_product(dtype: str = "BFloat16"):
    """Compiled fn(A, B, C): bf16 or fp16 inputs, float32 result."""
    kind = getattr(cutlass, dtype)
    m, n, k = (cute.sym_int() for _ in range(3))
    tensors = _matrix(kind, (m, k)), _matrix(kind, (n, k)), _matrix(Float32, (m, n), 2)
    return cute.compile(MatrixProduct(), *tensors, make_fake_stream(use_tvm_ffi_env_stream=True), options=OPTIONS)


@functools.cache
def tensor_copy(swizzle: int = 3):
    """Compiled fn(input, out) on bf16 matrices."""
    m, n = (cute.sym_int() for _ in range(2))
    tensors = _matrix(cutlass.BFloat16, (m, n)), _matrix(cutlass.BFloat16, (m, n))
    return cute.compile(TensorCopy(swizzle), *tensors, make_fake_stream(use_tvm_ffi_env_stream=True), options=OPTIONS)
