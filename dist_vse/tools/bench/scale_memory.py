"""A rank's memory by what it is for, from what is held when each part of a step begins."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch

from dist_vse import distributed
from dist_vse.common import step_timer
from dist_vse.common.memory import TensorMemoryTracker

T = TypeVar("T")


class _Heap(Protocol):
    peak: int

    @property
    def held(self) -> int: ...


class _CudaHeap:
    """The same two numbers from PyTorch's allocator."""

    @property
    def held(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    @peak.setter
    def peak(self, value: int) -> None:
        torch.cuda.reset_peak_memory_stats()


class PartMemory:
    """Notes the bytes that are held when a part first begins, and the peak within each part."""

    def __init__(self, heap: _Heap) -> None:
        self.heap = heap
        self.before: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._part = step_timer.OTHER

    def begin(self, part: str) -> None:
        """End a part and begin the next."""
        self.peaks[self._part] = max(self.peaks.get(self._part, 0), self.heap.peak)
        self.heap.peak = self.heap.held
        self.before.setdefault(part, self.heap.held)
        self._part = part


def measure_memory(build: Callable[[], T], step: Callable[[T], None]) -> tuple[T, PartMemory]:
    """Build what takes steps, take two of them, and return it with the memory of the second.

    On the CPU the tensors that operators return are counted, not what an operator needs inside.
    """
    with _heap() as heap:
        built = build()
        step(built)  # which makes the optimizer's states
        heap.peak = heap.held
        memory = PartMemory(heap)
        with step_timer.listening(memory):
            step(built)
    return built, memory


def memory_parts(
    memory: PartMemory, *, inputs: int, outputs: int, gradients: int
) -> dict[str, int]:
    """Return bytes by what they are for; the first three and the larger of the next give the peak.

    `inputs` are the bytes of a rank's batch, `outputs` those of its features before the loss,
    `gradients` those of the trainable parameters. state: what is held between two steps (weights,
    optimizer, the engine's buffers). features: with their gradients and copies. kept_graphs:
    activations that stay from the first pass to the second. loss: at most, without the features.
    encoders: activations and gradients, at most.
    """
    before, peaks = memory.before, memory.peaks
    start = before["encode"]
    kept = max(0, before["loss"] - start - outputs)
    features = before["second_pass"] - start - kept
    in_encoders = max(peaks.get(part, 0) for part in ("encode", "second_pass", "reduce", "step"))
    in_loss = max(peaks.get(part, 0) for part in ("loss", "gather"))
    return {
        "inputs": inputs,
        "state": start - inputs,
        "features": features,
        "encoders": in_encoders - start - features,
        "loss": in_loss - before["second_pass"],
        "kept_graphs": kept,
        "gradients": gradients,
        "peak": max(in_encoders, in_loss),
    }


@contextlib.contextmanager
def _heap() -> Iterator[_Heap]:
    if distributed.device().type == "cuda":
        yield _CudaHeap()
        return
    with TensorMemoryTracker() as storages:
        yield storages
