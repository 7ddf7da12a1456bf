"""Memory that is registered once is pinned in all its parts, and no longer than it lives."""

import logging

import pytest
import torch

from dist_vse.common import pinned
from dist_vse.data.shared_buffers import BatchBuffers
from dist_vse.training.prefetch_to_device import prefetch_to_device
from tests.support import pretend_gpu
from tests.support.pretend_gpu import GPU, GpuTensor


def test_batches_of_registered_buffers_reach_a_gpu_without_a_copy_by_the_host() -> None:
    with pretend_gpu.pretend_gpu() as gpu:
        buffers = BatchBuffers(2, 4, 8)
        pinned.register(buffers.images)
        tasks = buffers.tasks(1)
        assert [next(tasks), next(tasks)] == [None, 0]
        buffers.take()
        images = buffers.take()
        assert images is not None
        images.fill_(3)
        assert images.pin_memory().data_ptr() == images.data_ptr()
        chunks = [{"images": part} for part in images.pin_memory().split(2)]
        for chunk in prefetch_to_device(chunks, GPU):
            assert isinstance(chunk["images"], GpuTensor)
            assert bool((chunk["images"].inner == 3).all())
        assert not gpu.waits
        del buffers, tasks, images, chunks, chunk
        assert not pretend_gpu._pinned


def test_what_cannot_be_registered_is_said_and_copied(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pretend_gpu._Cudart, "cudaHostRegister", lambda *_: 2)
    monkeypatch.setattr(logging.getLogger("dist_vse"), "propagate", True)
    with pretend_gpu.pretend_gpu():
        pinned.register(torch.zeros(8))
        assert not pretend_gpu._pinned
    assert "can't register" in caplog.text and "error 2" in caplog.text
