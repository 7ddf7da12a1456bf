"""`dist-vse doctor --gpu --autotune`: time shapes of the kernels' tiles, and keep the fastest."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.losses.global_loss import global_loss
from dist_vse.losses.kernel_choice import TRIED
from dist_vse.losses.options import LossOptions
from dist_vse.losses.tuned_blocks import Blocks, Table, cache_path, key, write_blocks
from dist_vse.tools.bench.device_time import time_on_device

# A kernel, and the loss in which it is timed. Sums first: the weights' turn has the best of them.
KERNELS = {
    "softmax_sums": "convse",
    "weights": "convse",
    "hardest": "convse++",
    "pair_sums": "siglip",
}
CANDIDATES = (
    Blocks(256, 128, 64, 8, 3),
    Blocks(128, 256, 64, 8, 3),
    Blocks(128, 256, 64, 8, 4),
    Blocks(256, 128, 64, 8, 4),
    Blocks(128, 128, 64, 8, 3),
    Blocks(128, 128, 64, 4, 3),
    Blocks(128, 128, 32, 8, 4),
    Blocks(128, 128, 128, 8, 2),
    Blocks(64, 256, 64, 4, 3),
)
ROWS, WIDTH = 8192, 512  # pairs in one process, and their embedding
CLOSE = 2**-5  # of the gradients to those in tiles: the products are in bfloat16
SPARE_S = 30.0  # of the limit: what is being compiled then may end


def autotune(task: Task) -> Finding:
    """Try every shape for every kernel with bfloat16 products; write the fastest to the cache."""
    path = cache_path(torch.cuda.get_device_name())
    device = torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = True  # as in a bfloat16 run
    return tune(device, path, CANDIDATES, ROWS, WIDTH, limit_s=task.limit_s - SPARE_S)


def tune(
    device: torch.device,
    path: Path,
    candidates: Sequence[Blocks],
    rows: int,
    width: int,
    *,
    limit_s: float = math.inf,
) -> Finding:
    """Time each kernel's candidates in a whole loss; shapes that compute it wrong do not count."""
    began = time.monotonic()
    features = _features(rows, width, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    seconds: dict[str, dict[str, float | str]] = {}
    best: Table = {}
    try:
        for kernel, loss in KERNELS.items():
            name = key(kernel, dtype)
            right = _gradients(loss, "tiled", features)
            timed: dict[Blocks, float] = {}
            seconds[kernel] = {}
            for shape in candidates:
                if time.monotonic() - began > limit_s:
                    break
                TRIED[name] = shape
                found = _try(loss, features, right, device)
                seconds[kernel][str(tuple(shape))] = found
                if isinstance(found, float):
                    timed[shape] = found
            del TRIED[name]
            if timed:
                best[name] = TRIED[name] = min(timed, key=lambda shape: timed[shape])
    finally:
        TRIED.clear()
    figures: dict[str, Any] = {"seconds": seconds, "path": str(path), "best": best}
    if not best:
        return Finding(False, "no shape runs and is right; nothing was written", figures)
    write_blocks(path, best)
    words = ", ".join(f"{name} {tuple(shape)}" for name, shape in best.items())
    return Finding(True, f"{words}; wrote {path}", figures)


def _try(
    loss: str, features: list[Tensor], right: list[Tensor], device: torch.device
) -> float | str:
    """Return the seconds of the loss, or how it fails."""
    try:
        found = _gradients(loss, "fused", features)
        error = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True)
        )
        if not error <= CLOSE:
            return f"wrong: {error:.1e}"
        return time_on_device(lambda: _gradients(loss, "fused", features), device).wall_s
    except Exception as error:  # whatever the compiler or the driver raises
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _gradients(loss: str, kernels: str, features: list[Tensor]) -> list[Tensor]:
    options = LossOptions(kernels=kernels, bf16_products=features[0].is_cuda)
    scale = features[0].new_full((1,), 1 / 0.07).log()
    bias = features[0].new_full((1,), -10.0)
    value = global_loss(loss, features[0], features[1], scale, bias, options).loss
    return [value.detach(), *torch.autograd.grad(value, features)]


def _features(rows: int, width: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(2, rows, width, generator=generator)
    made[1] += 0.5 * made[0]
    unit = torch.nn.functional.normalize(made, dim=2).to(device)
    return [x.clone().requires_grad_() for x in unit.unbind()]
