"""Measure how many bytes a function allocates: what it keeps, and its peak."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

T = TypeVar("T")


@dataclass(frozen=True)
class Allocated:
    """Bytes in addition to those allocated before."""

    held: int  # after the call, while its result is alive
    peak: int  # maximum during the call


def measure(work: Callable[[], T], device: torch.device) -> tuple[T, Allocated]:
    """Run `work`; return its result and what it allocated on the device.

    On the CPU only the tensors that operators return are counted, not their internal workspace.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        after, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return result, Allocated(after - before, peak - before)
    with TensorMemoryTracker() as storages:
        result = work()
    return result, Allocated(storages.held, storages.peak)


class TensorMemoryTracker(TorchDispatchMode):
    """Tracks the memory of all tensors that are made inside the block.

    `held` and `peak` are bytes. Set `peak` to `held` to measure a later part of the work.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for given in tree_iter((args, kwargs)):  # a tensor first seen as an input existed before
            if isinstance(given, torch.Tensor):
                self._count(given.untyped_storage(), made=False)
        result = func(*args, **(kwargs or {}))
        for made in tree_iter(result):
            if isinstance(made, torch.Tensor) and made.device.type != "meta":  # a shape, no memory
                self._count(made.untyped_storage(), made=True)
        return result

    def _count(self, storage: torch.UntypedStorage, *, made: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made else 0
        self.held += size
        self.peak = max(self.peak, self.held)
        self._known.add(key)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size
