"""Checks 1 and 2: what this machine is, and the most that it can do."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.units import GIB
from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.runs.environment import describe_environment
from dist_vse.training.flops import peak_of

SIDE = 8192  # of products
CONVOLUTION = (256, 256, 28)  # images, channels, side
BYTES = 1 << 30
LAUNCHES = 2000
CLOSE = 0.7  # of the data sheet
TERA, GB = 1e12, 1e9


def check_machine(task: Task) -> Finding:
    """Say what is here: versions, devices, and the flags that change numbers in silence."""
    here = distributed.device()
    figures: dict[str, Any] = {
        **describe_environment(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }
    faults = []
    words = f"torch {torch.__version__}, {torch.get_num_threads()} threads, no GPU is used"
    if here.type == "cuda":
        found = torch.cuda.get_device_properties(here)
        figures |= {
            "gpus": torch.cuda.device_count(),
            "capability": [found.major, found.minor],
            "memory_gib": found.total_memory / GIB,
            "nccl": list(torch.cuda.nccl.version()),
            "cudnn": torch.backends.cudnn.version(),
            "cuda": torch.version.cuda,
            "driver_cuda": getattr(torch._C, "_cuda_getDriverVersion", lambda: None)(),
        }
        words = (
            f"{torch.cuda.device_count()} x {found.name}, capability {found.major}.{found.minor}, "
            f"torch {torch.__version__}, NCCL {'.'.join(map(str, figures['nccl']))}, "
            f"cuDNN {figures['cudnn']}"
        )
        # The group has just been joined: float32 must mean float32 until a run says otherwise.
        if figures["matmul_tf32"] or figures["cudnn_tf32"]:
            faults.append("TF32 is on where float32 was asked for")
        if not torch.cuda.is_bf16_supported():
            faults.append("no bfloat16: set engine.precision=fp32")
    return Finding(not faults, "; ".join([words, *faults]), figures)


def check_ceilings(task: Task) -> Finding:
    """Measure products, convolutions, copies and launches; compare with the data sheet."""
    here = distributed.device()
    rates = {**_product_rates(here), **_copy_rates(here), **_costs(here)}
    rates["memory_gib"] = torch.cuda.get_device_properties(here).total_memory / GIB
    rates["process_gib"] = _process_gib(here)
    name = torch.cuda.get_device_name(here)
    figures: dict[str, Any] = {"device": name, **rates}
    low, known = [], False
    for precision in ("fp32", "tf32", "bf16"):
        peak = peak_of(name, precision)
        if peak is not None:
            known = True
            figures[f"{precision}_share"] = rates[f"{precision}_tflops"] * TERA / peak
            if figures[f"{precision}_share"] < CLOSE:
                low.append(f"{precision} has {figures[f'{precision}_share']:.0%} of its data sheet")
    words = (
        f"TFLOP/s: fp32 {rates['fp32_tflops']:.0f}, tf32 {rates['tf32_tflops']:.0f}, bf16 "
        f"{rates['bf16_tflops']:.0f}; GB/s: copy {rates['copy_gb_per_s']:.0f}, from the host "
        f"{rates['pinned_gb_per_s']:.0f} (pageable {rates['pageable_gb_per_s']:.0f})"
    )
    if not known:
        low_words = f"no data sheet of {name} is known here"
        return Finding(True, f"{words}; {low_words}", figures)
    return Finding(not low, "; ".join([words, *low]), figures)


def seconds_of(work: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median seconds of a piece of work on the current GPU, by its events."""
    taken: list[float] = []
    for _ in range(2 + repeats):  # two warm up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken[2:])


def _product_rates(here: torch.device) -> dict[str, float]:
    x = torch.randn(SIDE, SIDE, device=here)
    images, channels, side = CONVOLUTION
    pictures = torch.randn(images, channels, side, side, device=here)
    kernels = torch.randn(channels, channels, 3, 3, device=here)
    of_product, of_convolution = 2 * SIDE**3, 2 * images * side**2 * channels**2 * 9
    rates = {}
    for precision in ("fp32", "tf32", "bf16"):
        tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        y, p, k = (z.to(dtype) for z in (x, pictures, kernels))
        taken = seconds_of(lambda y=y: y @ y)  # type: ignore[misc]
        rates[f"{precision}_tflops"] = of_product / taken / TERA
        taken = seconds_of(lambda p=p, k=k: torch.conv2d(p, k, padding=1))  # type: ignore[misc]
        rates[f"conv_{precision}_tflops"] = of_convolution / taken / TERA
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return rates


def _copy_rates(here: torch.device) -> dict[str, float]:
    source = torch.empty(BYTES, dtype=torch.uint8, device=here)
    target = torch.empty_like(source)
    host = torch.ones(BYTES // 2, dtype=torch.uint8)
    started = time.perf_counter()
    pinned = host.pin_memory()
    pin_s = time.perf_counter() - started
    half = target[: len(host)]

    def from_host(memory: Tensor) -> float:
        taken = seconds_of(lambda: half.copy_(memory, non_blocking=True), 3)
        return len(host) / taken / GB

    rates = {
        "copy_gb_per_s": 2 * BYTES / seconds_of(lambda: target.copy_(source)) / GB,
        "pinned_gb_per_s": from_host(pinned),
        "pageable_gb_per_s": from_host(host),
        "pin_gb_per_s": len(host) / pin_s / GB,
    }
    runtime: Any = torch.cuda.cudart()
    started = time.perf_counter()
    if int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)) == 0:
        rates["register_gb_per_s"] = len(host) / (time.perf_counter() - started) / GB
        rates["registered_gb_per_s"] = from_host(host)
        runtime.cudaHostUnregister(host.data_ptr())
    return rates


def _costs(here: torch.device) -> dict[str, float]:
    """Return what a launch takes the host, and AdamW an element."""
    x = torch.zeros(1, device=here)
    for count in (100, LAUNCHES):  # the first ones load the kernel
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            x.add_(1)
        torch.cuda.synchronize()
    launch_us = (time.perf_counter() - started) / LAUNCHES * 1e6
    parameter = torch.nn.Parameter(torch.zeros(1 << 26, device=here))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    taken = seconds_of(optimizer.step, 3)
    return {"launch_us": launch_us, "optimizer_ns": taken / len(parameter) * 1e9}


def _process_gib(here: torch.device) -> float:
    """Return what this process takes of the GPU besides PyTorch's tensors: CUDA's context."""
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info(here)
    return (whole - free - torch.cuda.memory_reserved(here)) / GIB
