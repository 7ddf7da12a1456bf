"""A pretend GPU: tensors that say cuda:0, compute on the CPU, and refuse to meet the host's.

Every operator really runs, on the CPU tensor inside, so code whose path depends on its data works.
What a run on a CPU hides is seen here: tensors of host and device in one operator, and each time
the host waits for the device. Not seen: cuDNN, autocast, streams, time. C++ sees CPU tensors.
DeepSpeed, if it is imported, finds the GPU too.
"""

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dist_vse import distributed
from dist_vse.distributed import collectives
from tests.support.paths import ROOT

GPU = torch.device("cuda", 0)
DEEPSPEED = "deepspeed"

# The host waits for what these return: a number, or a size that depends on the data.
_READ_BACK = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"_to_copy", "copy_"}


class HostMeetsDeviceError(RuntimeError):
    """An operator was given tensors of host and device."""


class GpuLog:
    """What was seen, by place in our code."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.deepspeeds: Counter[str] = Counter()
        """Waits in DeepSpeed's own code."""

    def wait(self, what: str) -> None:
        """Note that the host waits here."""
        place = _place()
        (self.deepspeeds if place.startswith(DEEPSPEED) else self.waits)[f"{what} at {place}"] += 1


_log = GpuLog()
_pinned: dict[int, object] = {}  # by their addresses: tensors that stay, sizes of memory


def _place() -> str:
    """Return the innermost line of the package; a line of DeepSpeed's where that is further in."""
    for frame in reversed(traceback.extract_stack()):
        if f"/{DEEPSPEED}/" in frame.filename:
            return f"{DEEPSPEED}/{frame.filename.split(f'/{DEEPSPEED}/')[-1]}:{frame.lineno}"
        ours = frame.filename.startswith(str(ROOT / "dist_vse"))
        if ours and not frame.filename.endswith("collective_timing.py"):  # in between the two
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere"


class GpuTensor(Tensor):
    """A tensor of the pretend GPU; `inner` is where it really lies."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "GpuTensor":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    data = property(
        lambda self: GpuTensor(self.inner.detach()),
        lambda self, value: setattr(self, "inner", _inner(value)),
    )

    def __repr__(self, **_: Any) -> str:
        return f"GpuTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        _log.wait("tolist")
        return self.inner.tolist()

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        _log.wait("cpu")
        return self.inner.detach().clone()

    def record_stream(self, stream: Any) -> None:
        pass

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Copy to the host, or change the type."""
        devices = [x for x in (*args, kwargs.get("device")) if isinstance(x, (str, torch.device))]
        if any(torch.device(x).type == "cpu" for x in devices):
            return self.cpu()
        named = [x.dtype if isinstance(x, Tensor) else x for x in (*args, kwargs.get("dtype"))]
        dtype = next((x for x in named if isinstance(x, torch.dtype)), self.dtype)
        return Tensor.to(self, dtype, copy=bool(kwargs.get("copy")))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _OnGpu(TorchDispatchMode):
    """Sees what is made on the device, and what is sent there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, GpuTensor) else x


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the tensors inside; its results are where the device would have them."""
    name = func._schema.name.removeprefix("aten::")
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, GpuTensor)]
    here = [x for x in given if not isinstance(x, GpuTensor) and x.ndim > 0]
    if there and here and name not in _COPIES:
        raise HostMeetsDeviceError(f"tensors of host and device in {name} at {_place()}")
    target = kwargs.get("device")
    to_gpu = target is not None and torch.device(target).type == "cuda"
    on_gpu = bool(there) if target is None or there else to_gpu
    if there:
        _note_waits(name, args)
    elif name == "_to_copy" and to_gpu and given[0].numel() and not _is_pinned(given[0]):
        _log.wait("copy from pageable memory")
    if name == "copy_":
        on_gpu = isinstance(args[0], GpuTensor)
        if on_gpu != isinstance(args[1], GpuTensor) and args[1].ndim:
            _log.wait("copy_ between host and device")
    if name == "_local_scalar_dense":
        on_gpu = False
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs = {key: False if key == "pin_memory" else value for key, value in kwargs.items()}
    real_args, real_kwargs = tree_map(_inner, (args, kwargs))
    if name == "view" and not real_args[0].numel():
        # A parameter that ZeRO 3 has released keeps its shape to C++, which asks for a view of it.
        real_args = (real_args[0], real_args[0].shape)
    if name == "mm" and func._schema.overload_name.startswith("dtype"):
        made = real_args[0].float() @ real_args[1].float()  # bfloat16 factors, float32 sums
    else:
        made = func(*real_args, **real_kwargs)
    if not on_gpu:
        return made
    known = {id(_inner(x)): x for x in there}  # changed in place

    def on_device(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, GpuTensor):
            return x
        return known[id(x)] if id(x) in known else GpuTensor(x)

    return tree_map(on_device, made)


def _is_pinned(x: Tensor) -> bool:
    return x.untyped_storage().data_ptr() in _pinned


def _note_waits(name: str, args: Any) -> None:
    if name in _READ_BACK:
        _log.wait(name)
    if name in _INDEXING:
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            _log.wait("index by truth values")


class _Nothing:
    """A stream, an event: there is one queue only."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: _Nothing()


def _pin(x: Tensor) -> Tensor:
    """Copy into memory that a device reads without the host; it is known by its address."""
    if _is_pinned(x):
        return x
    pinned = x.clone()
    _pinned[pinned.untyped_storage().data_ptr()] = pinned
    return pinned


_H100 = SimpleNamespace(total_memory=80 << 30, major=9, minor=0)


class _Cudart:
    """CUDA's runtime, as far as memory of the host goes."""

    @staticmethod
    def cudaHostRegister(address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        _pinned[address] = size
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> int:  # noqa: N802
        _pinned.pop(address, None)
        return 0


@contextlib.contextmanager
def pretend_gpu() -> Iterator[GpuLog]:
    """Let the package find a GPU in the block; yield what is seen there.

    Messages between ranks go the way of NCCL, over gloo; those in host memory go as they do.
    """
    _log.waits.clear()
    _log.deepspeeds.clear()
    _pinned.clear()
    autocast, device, plain_tensor = torch.autocast, distributed.device, torch.tensor

    def cpu_autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        made = plain_tensor(data, **kwargs)
        on_gpu = device is not None and torch.device(device).type == "cuda"
        if on_gpu:  # copied there from memory that is not pinned
            _log.wait("tensor")
        return GpuTensor(made) if on_gpu else made

    patches: list[tuple[Any, str, Any]] = [
        (torch, "tensor", tensor),
        (torch.cuda, "Stream", _Nothing),
        (torch.cuda, "Event", _Nothing),
        (torch.cuda, "current_stream", _Nothing),
        (torch.cuda, "stream", _Nothing),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "cudart", _Cudart),
        (torch.cuda, "get_device_properties", lambda *_: _H100),
        (torch, "autocast", cpu_autocast),
        (Tensor, "pin_memory", _pin),
        (collectives.dist, "get_backend", lambda *_: "nccl"),
    ]
    if DEEPSPEED in sys.modules:
        accelerator = sys.modules["deepspeed.accelerator"].get_accelerator()
        patches += [
            (accelerator, "device_name", lambda i=None: "cuda" if i is None else f"cuda:{i}"),
            (accelerator, "current_device_name", lambda: "cuda:0"),
            (accelerator, "on_accelerator", lambda x: x.is_cuda),
        ]
    patches += [
        (module, "device", lambda: GPU)
        for name, module in sys.modules.copy().items()
        if name.startswith("dist_vse") and getattr(module, "device", None) is device
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        # As FakeTensorMode does where there is no GPU; older PyTorch has no such function.
        getattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: None)()
        stack.enter_context(_OnGpu())  # type: ignore[no-untyped-call]
        yield _log


def move(model: nn.Module) -> None:
    """Put a model onto the pretend GPU, as `model.to` does."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = GpuTensor(parameter.detach())
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = GpuTensor(buffer)
