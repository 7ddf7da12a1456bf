"""What is copied to the host is copied once, and shares nothing with the original."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_vse.common.host_copy import host_copy
from tests.support.pretend_gpu import GpuTensor, pretend_gpu


class _Copies(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func._schema.name.removeprefix("aten::") in ("clone", "_to_copy", "copy_")
        return func(*args, **(kwargs or {}))


def test_a_tensor_of_the_host_is_copied_once() -> None:
    x = torch.arange(6.0)[1:]
    with _Copies() as copies:  # type: ignore[no-untyped-call]
        copy = host_copy(x)
    assert copies.count == 1
    x.zero_()
    assert copy.tolist() == [1, 2, 3, 4, 5]


def test_a_tensor_of_a_gpu_is_copied_once() -> None:
    with pretend_gpu():
        x = GpuTensor(torch.arange(6.0))
        with _Copies() as copies:  # type: ignore[no-untyped-call]
            copy = host_copy(x)
    assert copies.count == 1 and not isinstance(copy, GpuTensor)
    assert copy.untyped_storage().data_ptr() != x.inner.untyped_storage().data_ptr()
