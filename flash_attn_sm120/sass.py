"""The machine code of a cubin, as nvdisasm prints it.

Scheduling fields stand in the second 64-bit word of an instruction, from bit 41 on: stall cycles (4 bits), yield (1),
the scoreboard that a result sets (3), the one that reading the operands sets (3), the scoreboards waited for (6).
Source: Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking" (2018), section 2.1.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GET_NVDISASM = "pip install nvidia-cuda-nvdisasm brings it, 5 MB"
SCOREBOARDS = 6
ITEM = re.compile(
    r"^(?P<label>\.\w+):|/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+)?\s*(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x(?P<schedule>[0-9a-f]{16}) \*/",
    re.MULTILINE,
)
TARGET = re.compile(r"`\((\.\w+)\)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """opcode with its modifiers. stall: cycles until the warp's next. result, operands: the scoreboard that clears when
    the result is there or the operands are read, or None. waits: scoreboards that must be clear. leads_to: the places
    of what may come next; none where the warp ends."""

    opcode: str
    stall: int
    result: int | None
    operands: int | None
    waits: tuple[int, ...]
    leads_to: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


class NotAvailable(Exception):
    """The machine code can't be judged; says why."""


def find_nvdisasm() -> Path | None:
    """From NVIDIA's wheel, else Triton's copy, else from the PATH, where it may be too old."""
    for package in ("nvidia-cuda-nvdisasm", "triton"):
        try:
            files = metadata.files(package) or ()
        except metadata.PackageNotFoundError:
            continue
        found = next((file.locate() for file in files if file.stem == "nvdisasm"), None)
        if found is not None and found.exists():
            return Path(found)
    on_path = shutil.which("nvdisasm")
    return Path(on_path) if on_path else None


def disassemble(cubin: bytes) -> list[Instruction]:
    """The code of a cubin with one kernel. Raises NotAvailable where there is no nvdisasm or it can't read that."""
    tool = find_nvdisasm()
    if tool is None:
        raise NotAvailable("no nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        answer = subprocess.run([tool, "-c", "-hex", "-ndf", file], capture_output=True, text=True)
    if answer.returncode:
        raise NotAvailable(f"nvdisasm failed: {' '.join((answer.stdout + answer.stderr).split())}")
    return parse(answer.stdout)


def parse(text: str) -> list[Instruction]:
    """What `nvdisasm -c -hex` prints."""
    labels: dict[str, int] = {}
    found: list[re.Match] = []
    for item in ITEM.finditer(text):
        if item["label"]:
            labels[item["label"]] = len(found)
        else:
            found.append(item)
    return [_instruction(item, _leads_to(item, place, labels, len(found))) for place, item in enumerate(found)]


def _leads_to(item: re.Match, place: int, labels: dict[str, int], end: int) -> tuple[int, ...]:
    opcode, operands = item["opcode"], item["operands"]
    after = (place + 1,) if place + 1 < end else ()
    if opcode.startswith(("EXIT", "RET")):
        return after if item["guard"] else ()
    target = TARGET.search(operands) if opcode.startswith("BRA") else None
    if target is None:
        return after
    # a uniform predicate stands among the operands: BRA.U !UP0, `(.L_x_1)
    conditional = item["guard"] or operands[: target.start()].strip()
    return (labels[target[1]], *(after if conditional else ()))


def _instruction(item: re.Match, leads_to: tuple[int, ...]) -> Instruction:
    word = int(item["schedule"], 16)
    result, operands = word >> 46 & 7, word >> 49 & 7
    return Instruction(
        item["opcode"],
        word >> 41 & 15,
        result if result < SCOREBOARDS else None,
        operands if operands < SCOREBOARDS else None,
        tuple(board for board in range(SCOREBOARDS) if word >> 52 + board & 1),
        leads_to,
    )
