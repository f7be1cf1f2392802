"""warmup: kernels made ready before the first call, for servers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from flash_attn_sm120.kernel_file import Problem
from flash_attn_sm120.shipped import Shapes


def warmup(shapes: Iterable[Shapes | Problem], device: str | int = "cuda", *, show: bool = True) -> dict[str, int]:
    """Loads the kernels of these shapes, and compiles those that no file has, so that no call waits for a compiler.

    shapes: Shapes of a model, all of whose problems are taken, or single problems: AttentionProblem, CombineProblem.
    device: the GPU, as PyTorch names it, or its index. show: a progress bar on stderr, if that is a terminal.

    Returns how many kernels came from where: "loaded" before, "precompiled", "cached", "JIT". May run in a thread of
    its own; a call that needs a kernel in the meantime waits for that one kernel only.
    Raises TypeError for anything else in shapes, ValueError for a device without CUDA, RuntimeError where
    FLASH_ATTN_SM120_NO_JIT is set and no file has a kernel.
    """
    import torch

    from flash_attn_sm120 import checks, launchers, loader, problem
    from flash_attn_sm120.terminal import progress

    kinds = (problem.AttentionProblem, problem.CombineProblem, problem.ClassifyProblem)
    problems: dict[Problem, None] = {}
    for each in shapes:
        if not isinstance(each, (Shapes, *kinds)):
            checks.refuse("shapes", "Shapes or problems", checks.describe(each), TypeError)
        problems.update(dict.fromkeys(each.problems() if isinstance(each, Shapes) else [each]))
    place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if place.type != "cuda" or not torch.cuda.is_available():
        checks.refuse("device", "a CUDA device that PyTorch can use", device)
    if place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    found: Counter[str] = Counter()
    arch = launchers.target(place.index)
    for each in progress(list(problems), "warm-up") if show else problems:
        found["loaded" if loader.is_loaded(each, arch) else loader.source_of(each, arch)] += 1
        launchers.load(each, place)
    return dict(found)
