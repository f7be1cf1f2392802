"""The process group of a call: who takes part, and over which devices it can speak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from flash_attn_sm120.checks import describe, refuse

# PyTorch 2.13 has the second under the first's name.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Ranks:
    """rank: of this process in the group. backends: the group's backend for each kind of device."""

    group: Any
    rank: int
    world_size: int
    backends: dict[str, str]

    def talk_device(self, q: Any) -> torch.device:
        """Where small messages lie: on the CPU if the group has a backend for it, so that no GPU is waited for, else on
        q's GPU."""
        if "cpu" in self.backends:
            return torch.device("cpu")
        if isinstance(q, torch.Tensor) and q.device.type in self.backends:
            return q.device
        kind = next(iter(self.backends))
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def global_rank(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def check_device(self, device: torch.device) -> None:
        """That tensors on this device can be sent. Gloo's own way with GPU tensors isn't taken: it lacks half."""
        backend = self.backends.get(device.type)
        if backend is None or (device.type == "cuda" and backend == "gloo"):
            has = ", ".join(f"{name} for {kind}" for kind, name in sorted(self.backends.items()))
            refuse("group", f"a backend that sends {device.type} tensors, as q is on {device}", has)


def ranks_of(group: Any) -> Ranks:
    """group: a ProcessGroup that this process is in, or None for all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        refuse("group", "torch.distributed.init_process_group to have been called", "no process group")
    if group is None:
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER or not isinstance(group, dist.ProcessGroup):
        refuse("group", "a ProcessGroup that this process is in", describe(group), TypeError)
    pairs = (part.partition(":") for part in dist.get_backend_config(group).split(","))
    backends = {kind: name for kind, _, name in pairs}
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group), backends)
