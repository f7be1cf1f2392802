"""The tensors that change what is computed, brought into the form that kernels take without a copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flash_attn_sm120 import checks
from flash_attn_sm120.workspace import lasting

_constants: dict[tuple[float, torch.device], torch.Tensor] = {}


def way_of(name: str, given: Any, shape: tuple[int, ...]) -> Callable[[Any], torch.Tensor | None]:
    """What makes a tensor of this shape of an argument of this form; None of nothing and of a number."""
    if not isinstance(given, torch.Tensor):
        return nothing
    return partial(_plain, name) if given.shape == shape else partial(_repeated, name, shape)


def constant_way(value: float, shape: tuple[int, ...], device: torch.device) -> Callable[[Any], torch.Tensor]:
    """A number as a tensor of this shape that stays on the device; making it waits for the device once."""
    found = _constants.get((value, device))
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            expected = "a tensor, or a number that a call before the capture had"
            checks.refuse("v_descale", expected, value)
        found = lasting(lambda: torch.tensor(value, dtype=torch.float32, device=device), device)
        _constants[value, device] = found
    repeated = found.expand(shape)
    return lambda _: repeated


def nothing(_: Any) -> None:
    return None


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.requires_grad:
        return tensor
    checks.check_forward_only({name: tensor})
    return tensor.detach()


def _repeated(name: str, shape: tuple[int, ...], tensor: torch.Tensor) -> torch.Tensor:
    return _plain(name, tensor).expand(shape)
