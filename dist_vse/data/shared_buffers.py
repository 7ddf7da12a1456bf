"""Shared-memory buffers for whole batches of images: workers fill them, the trainer reads them.

No image is copied. A buffer is free again once nobody holds a tensor made of it. While no buffer is
free, the workers send a batch's images as tensors, and the trainer joins them.
"""

import weakref
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from dist_vse.common.errors import UserError, first_line


class BatchBuffers:
    """Shared memory for the images of several batches, and which of it is free."""

    def __init__(self, number: int, rows: int, side: int) -> None:
        """Allocate `number` buffers of `rows` images.

        Raises UserError if /dev/shm is too small.
        """
        shape = (number, rows, side, side, 3)
        num_bytes = number * rows * side * side * 3
        try:
            storage = torch.UntypedStorage._new_shared(num_bytes)
        except RuntimeError as error:
            raise UserError(
                f"no {num_bytes:,} bytes of shared memory for batches ({first_line(error)}); make "
                "/dev/shm larger, or set data.num_workers=0, which does not use it"
            ) from error
        self.images: Tensor = torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
        self._arrays = self.images.numpy()
        self._free = deque(range(number))
        self._assigned: deque[int | None] = deque()  # buffers of the batches in flight, in order

    def tasks(self, num_workers: int) -> Iterator[int | None]:
        """Yield each batch's buffer once for each worker; None where it has none.

        The first batch has none: a worker that has not started can't receive one.
        """
        buffer = None
        while True:
            self._assigned.append(buffer)
            for _ in range(num_workers):
                yield buffer
            buffer = self._free.popleft() if self._free else None

    def take(self) -> Tensor | None:
        """Return the images of the next batch, uint8 (b, 3, h, w); None if it has no buffer."""
        buffer = self._assigned.popleft()
        if buffer is None:
            return None
        array = self._arrays[buffer]
        weakref.finalize(array, self._free.append, buffer)  # the tensor keeps the array alive
        return torch.from_numpy(array).permute(0, 3, 1, 2)
