"""A PTX interpreter on NumPy: the kernels that ship, run on a machine without a GPU, with checks that no GPU makes.

with simulate(): the public functions take CPU tensors. launch() runs any function that CuTe DSL compiled.

It proves, for the inputs given, on the PTX and the host code that ship: right results; no access outside the tensors
that were passed, none between the rows of a strided one, none misaligned; no read of shared memory or of an output
that nothing wrote; every output written, by one thread block only; shared memory ordered by barriers, mbarriers,
waits for asynchronous copies and proxy fences, whatever the warps' timing; no deadlock; no barrier or warp-wide
instruction that a part of a warp misses. It can't show: speed; what ptxas makes of the PTX; faults of the hardware;
order inside one warp (a missing bar.warp.sync); inputs that were not run; order between thread blocks that talk
through atomics; the last bit of the approximated functions and of the tensor cores' sums.
"""

from .attention import load, simulate
from .launch import Simulation, active, launch
from .report import Report, SimulationError, UnsupportedInstruction

__all__ = [
    "Report",
    "Simulation",
    "SimulationError",
    "UnsupportedInstruction",
    "active",
    "launch",
    "load",
    "simulate",
]
