"""Time of a piece of work: by the wall, and of the device itself; with its kernels and memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dist_vse.common.memory import measure


@dataclass(frozen=True)
class DeviceTime:
    """What one call takes."""

    wall_s: float
    """Median, from an idle device to an idle device."""
    device_s: float | None
    """Sum over the kernels, copies left out; None on a CPU, which does all by itself."""
    kernels: int
    peak_bytes: int
    """Above what was allocated before."""

    @property
    def device_share(self) -> float:
        """Return the share of the wall time in which the device works; the rest it waits."""
        return 1.0 if self.device_s is None else self.device_s / self.wall_s


def time_on_device(
    work: Callable[[], Any], device: torch.device, *, repeats: int = 3
) -> DeviceTime:
    """Call the work `repeats` times and twice more: to warm up, and to count memory and kernels."""
    work()
    taken = []
    for _ in range(repeats):
        _finish(device)
        started = time.perf_counter()
        work()
        _finish(device)
        taken.append(time.perf_counter() - started)
    wall_s = statistics.median(taken)
    if device.type != "cuda":
        return DeviceTime(wall_s, None, 0, measure(work, device)[1].peak)
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        peak = measure(work, device)[1].peak
    kernels = [
        event
        for event in traced.events() or ()
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Mem")
    ]
    device_s = sum(event.device_time_total for event in kernels) / 1e6
    return DeviceTime(wall_s, device_s, len(kernels), peak)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
