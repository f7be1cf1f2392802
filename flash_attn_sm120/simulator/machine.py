"""The machine: registers of all warps of a batch of CTAs, a program counter a lane, blocks run for all who stand there.

A batch's registers are arrays of shape (warps, 32), warps of all CTAs in a row, so one NumPy operation serves every
warp at the same instruction. Of the waiting basic blocks, the first in program order runs next; so lanes and warps that
took different ways meet again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import table
from .barriers import Barriers
from .constants import BASE_TYPES, EXIT, MAX_BLOCKS, SHARED_START, TYPES
from .global_memory import GlobalMemory, MemoryFault
from .parser import Imm, Instruction, Kernel, Reg, Special, Sym
from .report import Report, SimulationError, UnsupportedInstruction
from .shared_memory import SharedMemory


class Machine:
    """Runs one launch of a kernel.

    kernel: the parsed kernel; grid, block: CTAs and threads by axis; dynamic_smem: bytes; params: the parameter block;
    memory: the tensors; batch_warps: how many warps run side by side.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic_smem: int,
        params: bytes,
        memory: GlobalMemory,
        batch_warps: int = 256,
    ):
        self.kernel, self.grid, self.block, self.params, self.memory = kernel, grid, block, params, memory
        self.threads = block[0] * block[1] * block[2]
        self.warps_per_cta = -(-self.threads // 32)
        self.total_ctas = grid[0] * grid[1] * grid[2]
        self.ctas = max(1, min(self.total_ctas, batch_warps // self.warps_per_cta))
        self.warps = self.ctas * self.warps_per_cta
        self.warp_ids = np.arange(self.warps)
        self.cta_of = self.warp_ids // self.warps_per_cta
        self.lanes = np.arange(32)
        self.registers: dict[str, np.ndarray] = {}
        self.symbols: dict[str, int] = {p.name: p.offset for p in kernel.params}
        self.local_bytes = 0
        self.tensor_maps: dict = {}
        self._layout(dynamic_smem)
        self._thread_indices()
        self.ctas_talk = any(i.parts[0] in ("atom", "red") for i in kernel.instructions)
        self.barriers = Barriers(self)
        self._bind()

    # Layout and registers

    def _layout(self, dynamic_smem: int) -> None:
        end = SHARED_START
        for variable in sorted(self.kernel.variables, key=lambda v: v.size == 0):
            if variable.space == "shared":
                end = -(-end // variable.align) * variable.align
                self.symbols[variable.name] = end
                end += variable.size or dynamic_smem
            elif variable.space == "local":
                self.local_bytes = -(-self.local_bytes // variable.align) * variable.align
                self.symbols[variable.name] = self.local_bytes
                self.local_bytes += variable.size
        self.shared = SharedMemory(self.ctas, self.warps_per_cta, end - SHARED_START, self._granule(), SHARED_START)
        self.local_memory = np.zeros((self.warps, 32, -(-self.local_bytes // 16) * 16), np.uint8)

    def _granule(self) -> int:
        """The narrowest shared access of the kernel, in bytes."""
        return min([table.shared_width(i) for i in self.kernel.instructions] + [16])

    def _thread_indices(self) -> None:
        thread = (self.warp_ids % self.warps_per_cta)[:, None] * 32 + self.lanes
        x, y, _ = self.block
        values = {
            "%tid.x": thread % x,
            "%tid.y": thread // x % y,
            "%tid.z": thread // (x * y),
            "%laneid": np.broadcast_to(self.lanes, thread.shape),
            "%warpid": thread // 32,
            "%cluster_ctarank": thread * 0,
            "%cluster_nctarank": thread * 0 + 1,
            "%is_explicit_cluster": thread * 0,
        }
        for axis, name in enumerate("xyz"):
            values[f"%ntid.{name}"] = thread * 0 + self.block[axis]
            values[f"%nctaid.{name}"] = thread * 0 + self.grid[axis]
            for word in ("cluster_ctaid", "clusterid"):
                values[f"%{word}.{name}"] = thread * 0
            values[f"%cluster_nctaid.{name}"] = thread * 0 + 1
            values[f"%ctaid.{name}"] = thread * 0
        self.specials = {name: np.ascontiguousarray(v, dtype=np.uint32) for name, v in values.items()}
        self.alive = thread < self.threads

    def _array(self, name: str) -> np.ndarray:
        if name not in self.registers:
            base = self.kernel.registers[name].lstrip("bsuf") if name in self.kernel.registers else ""
            dtype = BASE_TYPES.get("pred" if self.kernel.registers.get(name) == "pred" else base)
            if dtype is None:
                raise UnsupportedInstruction(f"register {name} of type .{self.kernel.registers.get(name)}")
            self.registers[name] = np.zeros((self.warps, 32), dtype)
        return self.registers[name]

    def view(self, operand: object, dtype: np.dtype) -> np.ndarray:
        """A register's (warps, 32) array as `dtype`; the low part when the register is wider."""
        array = self._array(operand.name)
        size = np.dtype(dtype).itemsize
        if array.dtype == dtype:
            return array
        if array.dtype.itemsize == size and array.dtype != np.bool_:
            return array.view(dtype)
        if array.dtype.itemsize > size and np.dtype(dtype) != np.bool_:
            return array.view(dtype)[:, :: array.dtype.itemsize // size]
        raise UnsupportedInstruction(f"register {operand.name} read as {np.dtype(dtype)}")

    def read(self, operand: object, dtype: np.dtype | str) -> Callable[[slice | np.ndarray], np.ndarray]:
        """A function of the selection that gives the operand's values, an array (n, 32) or a scalar."""
        dtype = TYPES[dtype] if isinstance(dtype, str) else np.dtype(dtype)
        if isinstance(operand, Reg):
            array = self.view(operand, dtype)
            if operand.negated:
                return lambda S: ~array[S]
            return array.__getitem__
        if isinstance(operand, Special):
            if operand.name not in self.specials:
                raise UnsupportedInstruction(f"special register {operand.name}")
            array = self.specials[operand.name]
            if dtype.itemsize == 8:
                return lambda S: array[S].astype(dtype)
            return (array if dtype.itemsize == 4 else array.astype(dtype)).view(dtype).__getitem__
        value = self.constant(operand, dtype)
        return lambda S: value

    def constant(self, operand: object, dtype: np.dtype) -> np.generic:
        """A literal or an address as a NumPy scalar."""
        dtype = np.dtype(dtype)
        if isinstance(operand, Sym):
            if operand.name not in self.symbols:
                raise UnsupportedInstruction(f"symbol {operand.name}")
            number = self.symbols[operand.name] + operand.offset
        elif isinstance(operand, Imm):
            number = operand.value
            if operand.kind == "f64" and dtype == np.float32:
                return np.uint64(number).view(np.float64).astype(np.float32)
        else:
            raise UnsupportedInstruction(f"operand {operand}")
        if dtype == np.bool_:
            return np.bool_(number)
        bits = number & ((1 << 8 * dtype.itemsize) - 1)
        return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]

    def write(
        self, operand: object, dtype: np.dtype | str
    ) -> Callable[[slice | np.ndarray, np.ndarray | None, np.ndarray], None]:
        """A function (selection, mask, values) that stores into a register; a wider one is zero- or sign-extended."""
        dtype = TYPES[dtype] if isinstance(dtype, str) else np.dtype(dtype)
        if (isinstance(operand, Reg) and operand.name == "_") or (isinstance(operand, Sym) and operand.name == "_"):
            return lambda S, mask, values: None
        if not isinstance(operand, Reg):
            raise UnsupportedInstruction(f"destination {operand}")
        array = self._array(operand.name)
        if array.dtype.itemsize != dtype.itemsize and dtype.kind in "iu":
            dtype = np.dtype(f"{dtype.kind}{array.dtype.itemsize}")
        array = array if array.dtype == dtype else array.view(dtype)

        def store(S, mask, values):
            if mask is None:
                array[S] = values
            elif S.__class__ is slice:
                np.copyto(array[S], values, where=mask, casting="unsafe")
            else:
                array[S] = np.where(mask, values, array[S])

        return store

    # Binding: instructions become closures, grouped into basic blocks

    def _bind(self) -> None:
        instructions = self.kernel.instructions
        leaders = {0, *self.kernel.labels.values()}
        for i, ins in enumerate(instructions):
            if table.ends_block(ins):
                leaders.add(i + 1)
            if table.starts_block(ins):
                leaders.add(i)
        starts = sorted(i for i in leaders if i < len(instructions))
        self.block_at = {start: number for number, start in enumerate(starts)}
        self.block_at[len(instructions)] = EXIT
        self.blocks: list[tuple[list, Callable | None, int]] = []
        for number, start in enumerate(starts):
            end = starts[number + 1] if number + 1 < len(starts) else len(instructions)
            after = number + 1 if number + 1 < len(starts) else EXIT
            steps, last = [], None
            for ins in instructions[start:end]:
                if table.ends_block(ins):
                    last = table.bind_control(self, ins, after)
                else:
                    steps.append(self._guarded(ins))
            self.blocks.append((steps, last, after))

    def _guarded(self, ins: Instruction) -> Callable:
        step = table.bind(self, ins)
        if ins.guard is None:
            return step
        predicate = self.read(ins.guard, "pred")

        def run(S, mask):
            p = predicate(S)
            if mask is not None:
                p = p & mask
            elif p.all():
                step(S, None)
                return
            if p.any():
                step(S, p)

        return run

    def target(self, operand: Sym) -> int:
        """The block that a label begins."""
        return self.block_at[self.kernel.labels[operand.name]]

    # Running

    def run(self) -> None:
        """Run every CTA of the grid; raises SimulationError at the first finding."""
        self.memory.begin_launch()
        with np.errstate(all="ignore"):
            for first in range(0, self.total_ctas, self.ctas):
                self._start(first)
                self._run_batch()

    def _start(self, first: int) -> None:
        ctas = first + self.cta_of
        x, y, _ = self.grid
        for axis, values in enumerate((ctas % x, ctas // x % y, ctas // (x * y))):
            self.specials["%ctaid." + "xyz"[axis]][:] = values[:, None]
        self.first_cta = first
        self.pc = np.where(self.alive & (ctas < self.total_ctas)[:, None], 0, EXIT).astype(np.int64)
        self.warp_pc = self.pc.min(axis=1)
        self.uniform = (self.pc == self.pc[:, :1]).all(axis=1)
        self.blocked = np.zeros(self.warps, bool)
        self.shared.start()
        self.barriers.start()

    def _run_batch(self) -> None:
        for _ in range(MAX_BLOCKS):
            key = np.where(self.blocked, EXIT, self.warp_pc)
            current = int(key.min())
            if current == EXIT:
                if not self.blocked.any():
                    return
                self.barriers.stalled()
                continue
            chosen = np.flatnonzero(key == current)
            first, last = int(chosen[0]), int(chosen[-1]) + 1
            S = slice(first, last) if last - first == len(chosen) else chosen
            mask = None
            if not self.uniform[S].all():
                mask = self.pc[S] == current
            steps, control, after = self.blocks[current]
            for step in steps:
                step(S, mask)
            if control is None:
                self.advance(S, mask, after)
            else:
                control(S, mask)
        at = int(np.flatnonzero(self.warp_pc < EXIT)[0])
        self.fail("livelock", None, f"no end after {MAX_BLOCKS} basic blocks", at)

    def advance(self, S, mask: np.ndarray | None, block: int) -> None:
        """Send the active lanes to a block."""
        if mask is None:
            self.pc[S] = block
            self.warp_pc[S] = block
        else:
            self.set_pc(S, np.where(mask, block, self.pc[S]))

    def set_pc(self, S, pc: np.ndarray) -> None:
        self.pc[S] = pc
        self.warp_pc[S] = pc.min(axis=1)
        self.uniform[S] = (pc == pc[:, :1]).all(axis=1)

    # Help for the instructions

    def cta_numbers(self, warps):
        """CTA numbers in the grid, to check that CTAs leave each other's writes alone; None where they may talk."""
        return None if self.ctas_talk else self.first_cta + self.cta_of[warps]

    def accesses(self, S, mask: np.ndarray | None, address: np.ndarray):
        """(warps, lanes, addresses) that broadcast together: (n, 32) without a mask, flat with one."""
        warps = self.warp_ids[S]
        if np.ndim(address) == 0:
            address = np.full((len(warps), 32), address)
        if mask is None:
            return warps[:, None], self.lanes[None, :], address
        rows, lanes = np.nonzero(mask)
        return warps[rows], lanes, address[rows, lanes]

    def whole_warps(self, ins: Instruction, S, mask: np.ndarray | None):
        """The selection cut down to warps whose lanes are all active; a warp with some of them active is a fault."""
        if mask is None:
            return S
        count = mask.sum(axis=1)
        lanes_left = (self.pc[S] < EXIT).sum(axis=1)
        partial = (count > 0) & (count < lanes_left)
        if partial.any():
            at = int(np.argmax(partial))
            self.fail(
                "divergent warp", ins, "a warp-wide instruction with some lanes elsewhere", int(self.warp_ids[S][at])
            )
        return self.warp_ids[S][count > 0]

    def place(self, warp: int) -> tuple[tuple[int, int, int], int]:
        """CTA coordinates and warp number inside the CTA."""
        cta, (x, y, _) = self.first_cta + warp // self.warps_per_cta, self.grid
        return (cta % x, cta // x % y, cta // (x * y)), warp % self.warps_per_cta

    def fail(self, kind, ins, message, warp=None, lane=None, address=None, tensor=None) -> None:
        """Raise the finding with its place."""
        cta, local = self.place(warp) if warp is not None else (None, None)
        raise SimulationError(
            Report(
                kind, message, self.kernel.name, ins.line if ins else None, ins.text if ins else None,
                ins.source if ins else None, cta, local, lane, address, tensor,
            )
        )  # fmt: skip

    def fault(self, error: MemoryFault, ins: Instruction, warps, lanes, address) -> None:
        """Turn a memory fault into a report on the first faulty access."""
        shape = np.broadcast_shapes(np.shape(warps), np.shape(lanes), np.shape(address))
        at = np.unravel_index(int(np.argmax(np.broadcast_to(error.bad, shape))), shape)
        warp, lane, where = (int(np.broadcast_to(v, shape)[at]) for v in (warps, lanes, address))
        tensor = error.tensor or ("shared memory" if "shared" in error.kind + error.message else None)
        self.fail(error.kind, ins, error.message, warp, lane, where, tensor or self.memory.describe(where))
