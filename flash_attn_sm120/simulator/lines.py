"""Python lines of a finding. Keeping track of them takes two fifths of a compilation, so a kernel is compiled without,
and once more with them where something was found."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from .parser import Instruction, Kernel, parse
from .report import Report


def located(report: Report, kernels: dict[str, Kernel], lined: Any) -> Report:
    """The report with the Python line of its instruction. kernels: what ran; lined: the same, compiled with lines.

    Registers may have other names there, and loads of parameters another order."""
    if report.ptx_line is None or report.source is not None:
        return report
    ran = kernels[report.kernel].instructions
    twins = list(parse(lined.artifacts.PTX).values())[list(kernels).index(report.kernel)].instructions
    form = _form(report.ptx_text)
    ran, twins = ([each for each in instructions if _form(each.text) == form] for instructions in (ran, twins))
    if len(ran) != len(twins):
        return report
    return replace(report, source=twins[_place(ran, report.ptx_line)].source)


def _form(text: str) -> str:
    """An instruction without the names of its registers."""
    return re.sub(r"%[a-z]+\d+", "%", text)


def _place(instructions: list[Instruction], line: int) -> int:
    return next(i for i, instruction in enumerate(instructions) if instruction.line == line)
