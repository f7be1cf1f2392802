"""Before anything large is sent, all ranks tell one another what they are about to do: one that can't, or that is about
to do something else, is an error on every rank instead of a wait for it on the others."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, TypeVar

import torch

from flash_attn_sm120 import checks
from flash_attn_sm120.checks import refuse
from flash_attn_sm120.distributed.ranks import Ranks, all_gather_single
from flash_attn_sm120.distributed.streams import Side

MESSAGE_BYTES = 2048
# The first that an error is one of; NotImplementedError is a RuntimeError.
KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, TypeError, NotImplementedError, RuntimeError)
}
KIND_FIELDS = ("call", "dtype")  # where ranks differ in kind, not in value


class Described(Protocol):
    """What a rank is about to do; message: what all ranks must have alike, as JSON has it."""

    @property
    def message(self) -> dict[str, Any]: ...


T = TypeVar("T", bound=Described)


def agreed(ranks: Ranks, checked: bool, q: Any, prepare: Callable[[], T]) -> T:
    """prepare(), which checks this rank's arguments; raises on all ranks where it raises on one, or where their
    messages differ. checked=False: prepare() alone, nobody is asked. q: as it came, on the device to speak over."""
    own: T | Exception
    try:
        checks.check_flag("check_ranks", checked)
        own = prepare()
    except Exception as raised:  # whatever it is, the other ranks mustn't wait for this one
        own = raised
    if checked is not False and ranks.world_size > 1:
        message = {"error": failure(own)} if isinstance(own, Exception) else own.message
        answers = exchange(ranks, message, ranks.talk_device(q))
        if not isinstance(own, Exception):
            compare(answers)
    if isinstance(own, Exception):
        raise own
    return own


def exchange(ranks: Ranks, own: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """What each rank says; waits for all of them."""
    text = json.dumps(own).encode().ljust(MESSAGE_BYTES, b"\0")
    message = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    with Side(device):  # beside the caller's stream, whose work isn't waited for
        messages = torch.empty(ranks.world_size * MESSAGE_BYTES, dtype=torch.uint8, device=device)
        all_gather_single(messages, message.to(device), group=ranks.group)
        heard = messages.cpu()
    every = ctypes.string_at(heard.data_ptr(), heard.numel())
    if every == text * ranks.world_size:
        return [own] * ranks.world_size
    return [json.loads(every[at : at + MESSAGE_BYTES].rstrip(b"\0")) for at in range(0, len(every), MESSAGE_BYTES)]


def failure(error: Exception) -> list[str]:
    """Its kind and text, cut to what a message holds whatever is escaped in it."""
    kind = next((name for name, known in KINDS.items() if isinstance(error, known)), "RuntimeError")
    return [kind, str(error)[: MESSAGE_BYTES // 8]]


def compare(answers: list[dict[str, Any]]) -> None:
    """Raises on a rank that has no error of its own."""
    for rank, answer in enumerate(answers):
        if "error" in answer:
            kind, text = answer["error"]
            raise KINDS[kind](f"rank {rank}: {text}")
    first = answers[0]
    for rank, answer in enumerate(answers):
        for name, value in first.items():
            if answer.get(name) != value:
                differ(name, value, answer.get(name), rank)


def differ(name: str, value: Any, other: Any, rank: int) -> NoReturn:
    kind = TypeError if name in KIND_FIELDS else ValueError
    refuse(name, f"{value} on every rank as on rank 0", f"{other} on rank {rank}", kind)
