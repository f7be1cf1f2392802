"""The attention kernels of this package on the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from flash_attn_sm120.arguments import (
    Arguments,
    ClassifyArguments,
    CombineArguments,
    DualGroupArguments,
    GroupLengths,
    Lengths,
    Modifiers,
    Numbers,
    Queue,
)
from flash_attn_sm120.problem import AttentionProblem, ClassifyProblem, CombineProblem

from .launch import Simulation, active, launch, simulation

if TYPE_CHECKING:
    from flash_attn_sm120.compile import Problem


@functools.lru_cache(maxsize=128)
def artifact(problem: Problem, arch: str) -> Any:
    """The problem's kernel as dispatch and compile make it, with its PTX, its machine code and its plan kept."""
    from flash_attn_sm120.compile import build_best

    built, built.plan = build_best(problem, arch, keep=True)
    built.with_lines = functools.cache(lambda: build_best(problem, arch, keep=True, lines=True)[0])
    return built


class _Partials(NamedTuple):
    """arguments.Partials under names of their own, for reports."""

    out_partial: Any
    lse_partial: Any
    tickets: Any
    slots: Any


def load(problem: Problem, arch: str | None = None) -> Callable[..., None]:
    """The launcher for a problem that runs on the interpreter: loader.load's arguments, as CPU tensors."""
    current = active()
    kernel = artifact(problem, arch or (current.arch if current else "sm_120a"))

    def run(*values: Any) -> None:
        given, rest = Arguments(*values[: len(Arguments._fields)]), values[len(Arguments._fields) :]
        lengths = Lengths(*given.lengths)
        arguments = given._replace(
            lengths=lengths, modifiers=Modifiers(*given.modifiers), numbers=Numbers(*given.numbers)
        )
        name, kind = ("partials", _Partials) if problem.decode else ("queue", Queue)
        partials = [None if part is None else kind(*part) for part in rest]
        outputs = _outputs(given.out, given.lse, lengths.cu_seqlens_q)
        launch(kernel, (*arguments, *partials), names=(*Arguments._fields, name)[: len(values)], outputs=outputs)

    def run_combine(*values: Any) -> None:
        given = CombineArguments(*values)
        launch(kernel, given, names=given._fields, outputs=_outputs(given.out, given.lse, given.cu_seqlens))

    def run_classify(*values: Any) -> None:
        given = ClassifyArguments(*values)
        given = given._replace(lengths=Lengths(*given.lengths))
        counts = {name: getattr(given, name) for name in ("mask_block_cnt", "full_block_cnt")}
        launch(kernel, given, names=given._fields, outputs=counts)

    def run_dual_group(*values: Any) -> None:
        given = DualGroupArguments(*values)
        lengths = GroupLengths(*given.lengths)
        outputs = {}
        for group, marks in enumerate(lengths[:2]):
            out, lse, rows = given[4 + group], given[6 + group], int(marks[-1])
            outputs |= {f"out{group}": out[:rows], f"lse{group}": lse[:, : 0 if problem.padded_lse else rows]}
        arguments = given._replace(lengths=lengths, numbers=Numbers(*given.numbers))
        launch(kernel, arguments, names=given._fields, outputs=outputs)

    if isinstance(problem, AttentionProblem) and problem.dual_group:
        return run_dual_group
    return {CombineProblem: run_combine, ClassifyProblem: run_classify}.get(type(problem), run)


def _outputs(out: Any, lse: Any | None, cu_seqlens_q: Any | None) -> dict[str, Any]:
    """What the kernel must write: every row of the sequences; packed rows behind the last sequence stay as they are."""
    rows = int(cu_seqlens_q[-1]) if cu_seqlens_q is not None else None
    parts = {"out": out if rows is None else out[:rows]}
    if lse is not None:
        parts["lse"] = lse if rows is None else lse[:, :rows]
    return parts


@contextmanager
def simulate(
    arch: str = "sm_120a", *, edit: Callable[[str], str] | None = None, batch_warps: int = 256
) -> Iterator[Simulation]:
    """Inside the block the public functions take CPU tensors; their kernels for `arch` run on the PTX interpreter.

    arch: "sm_120a" or "sm_121a". edit: rewrites the PTX before it runs, to plant a fault. batch_warps: warps that run
    side by side, a matter of speed only. Yields a Simulation, which counts launches and seconds.
    Raises ValueError for another arch, SimulationError where the checker finds a fault, UnsupportedInstruction for PTX
    that the interpreter doesn't know.
    """
    from flash_attn_sm120.launchers import launches_on_cpu

    with simulation(arch, edit, batch_warps) as current, launches_on_cpu(functools.partial(load, arch=arch)):
        yield current
