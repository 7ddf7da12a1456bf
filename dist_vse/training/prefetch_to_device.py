"""Chunks on their way to the device."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Chunk = dict[str, Tensor]
"""What the model's forward takes, by keyword; on the host until its turn."""


def prefetch_to_device(chunks: Iterable[Chunk], device: torch.device) -> Iterator[Chunk]:
    """Yield the chunks on the device; a GPU copies the next one while it works on this one."""
    if device.type != "cuda":
        for chunk in chunks:
            yield _moved(chunk, device)
        return
    side = torch.cuda.Stream(device)
    before: tuple[Chunk, torch.cuda.Event] | None = None
    for chunk in chunks:
        with torch.cuda.stream(side):
            coming = _moved(chunk, device), side.record_event()
        if before:
            yield _awaited(*before)
        before = coming
    if before:
        yield _awaited(*before)


def _moved(chunk: Chunk, device: torch.device) -> Chunk:
    return {name: value.to(device, non_blocking=True) for name, value in chunk.items()}


def _awaited(chunk: Chunk, copied: torch.cuda.Event) -> Chunk:
    """Have the current stream wait for the copy, and keep the memory until it has used it."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for value in chunk.values():
        value.record_stream(current)
    return chunk
