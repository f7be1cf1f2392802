"""What the simulator says when it stops: one exception for what the checker found, one for what it cannot run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Where and what a finding is. Fields that don't apply are None."""

    kind: str
    message: str
    kernel: str
    ptx_line: int | None = None
    ptx_text: str | None = None
    source: str | None = None
    cta: tuple[int, int, int] | None = None
    warp: int | None = None
    lane: int | None = None
    address: int | None = None
    tensor: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.message}", f"  kernel: {self.kernel}"]
        if self.ptx_line is not None:
            lines.append(f"  PTX line {self.ptx_line}: {self.ptx_text}")
        if self.source:
            lines.append(f"  Python: {self.source}")
        if self.cta is not None:
            place = f"  CTA {self.cta}"
            place += f", warp {self.warp}" if self.warp is not None else ""
            place += f", lane {self.lane}" if self.lane is not None else ""
            lines.append(place)
        if self.address is not None:
            lines.append(f"  address: {self.address:#x}" + (f" in {self.tensor}" if self.tensor else ""))
        elif self.tensor:
            lines.append(f"  tensor: {self.tensor}")
        return "\n".join(lines)


class SimulationError(RuntimeError):
    """A fault that the checker found in a kernel. `report` holds the fields."""

    def __init__(self, report: Report):
        super().__init__(str(report))
        self.report = report


class UnsupportedInstruction(NotImplementedError):
    """PTX that the interpreter does not know; nothing is guessed."""
