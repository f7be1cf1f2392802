"""What runs beside the caller's work: a second stream on a GPU; on a CPU everything happens in its turn."""

from __future__ import annotations

from functools import lru_cache
from types import TracebackType

import torch


@lru_cache(maxsize=64)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One a device. Its thread blocks go first: it brings what the caller's next launch waits for."""
    return torch.cuda.Stream(device, priority=-1)


class Side:
    """with Side(device): what is launched goes to the second stream; NCCL's collectives are ordered after it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = _stream(device) if device.type == "cuda" else None
        self._guards: list[torch.cuda.StreamContext] = []

    def __enter__(self) -> None:
        if self.stream is not None:
            self._guards.append(torch.cuda.stream(self.stream))
            self._guards[-1].__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.stream is not None:
            self._guards.pop().__exit__(kind, error, trace)

    def mark(self) -> torch.cuda.Event | None:
        """This point of the current stream, the caller's or, inside `with`, the second one."""
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.stream.device))
        return event

    def after(self, mark: torch.cuda.Event | None) -> None:
        """What the current stream gets from here on waits for a mark."""
        if self.stream is not None and mark is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(mark)
