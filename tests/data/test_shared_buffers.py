"""A buffer is used again when its last tensor is gone, and never before."""

from itertools import islice

import pytest

from dist_vse.common.errors import UserError
from dist_vse.data.shared_buffers import BatchBuffers


def test_a_buffer_is_free_once_nobody_holds_it() -> None:
    buffers = BatchBuffers(2, 3, 4)
    tasks = buffers.tasks(num_workers=2)
    assert list(islice(tasks, 6)) == [None, None, 0, 0, 1, 1]
    assert buffers.take() is None  # the first batch has none
    first = buffers.take()
    assert first is not None
    assert first.shape == (3, 3, 4, 4)
    buffers.images[0].fill_(7)
    row = first[1]
    del first
    assert list(islice(tasks, 2)) == [None, None]  # a row of it is held
    second = buffers.take()
    assert int(row.min()) == 7
    del row
    assert list(islice(tasks, 4)) == [0, 0, None, None]
    assert second is not None


def test_too_little_shared_memory_is_an_error() -> None:
    message = r"^no 300,000,000,000,000 bytes of shared memory .*; make /dev/shm larger, or set"
    with pytest.raises(UserError, match=message):
        BatchBuffers(1, 1_000_000, 10_000)
