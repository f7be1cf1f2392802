"""How much memory the tensors of a call take at a time, counted on a CPU."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counter(TorchDispatchMode):
    """Storages that operations make, as long as they live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        before = {self.address(x) for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)}
        result = operation(*arguments, **(keywords or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and self.address(x) not in before:
                self.add(x.untyped_storage())
        return result

    @staticmethod
    def address(x):
        return x.untyped_storage()._cdata

    def add(self, storage):
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, storage.nbytes())

    def gone(self, count):
        self.now -= count


def peak_bytes(call):
    """The most that is held at a time beyond what was there before. The call's result is thrown away."""
    with Counter() as counter:
        call()
    return counter.peak
