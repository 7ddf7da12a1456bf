"""`dist-vse doctor --gpu --autotune`: time shapes of the kernels' tiles, and keep the fastest."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.losses.global_loss import global_loss
from dist_vse.losses.kernel_choice import TRIED
from dist_vse.losses.options import LossOptions
from dist_vse.losses.tuned_blocks import Blocks, Table, cache_path, key, read_blocks, write_blocks
from dist_vse.tools.bench.device_time import time_on_device

# A kernel, and the loss in which it is timed. Sums first: the weights' turn has the best of them.
KERNELS = {
    "softmax_sums": "convse",
    "weights": "convse",
    "hardest": "convse++",
    "pair_sums": "siglip",
}
HALF_SHAPES = (
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
FLOAT_SHAPES = (  # of which a number takes twice the memory
    Blocks(64, 64, 32, 8, 3),
    Blocks(64, 64, 32, 4, 3),
    Blocks(128, 64, 32, 8, 3),
    Blocks(64, 128, 32, 8, 3),
    Blocks(128, 128, 32, 8, 2),
    Blocks(128, 128, 32, 8, 3),
    Blocks(64, 64, 64, 8, 2),
)
ROWS, WIDTH = 8192, 512  # pairs in one process, and their embedding
SPARE_S = 30.0  # of the limit: what is being compiled then may end


class Factors(NamedTuple):
    """How a loss's products take their factors."""

    features: torch.dtype = torch.float32
    bf16_products: bool = False
    tf32: bool = False
    close: float = 1e-3
    """Of the gradients to those in tiles."""
    shapes: Sequence[Blocks] = FLOAT_SHAPES

    @property
    def dtype(self) -> torch.dtype:
        """What the kernels are given; the interpreter takes float32 only."""
        return torch.bfloat16 if self.bf16_products else self.features


FACTORS = {  # the most common first: what the time does not suffice for is left out
    "bf16": Factors(bf16_products=True, tf32=True, close=2**-5, shapes=HALF_SHAPES),
    "tf32": Factors(tf32=True, close=2**-5),
    "fp32": Factors(),
    "fp16": Factors(torch.float16, tf32=True, close=2**-5, shapes=HALF_SHAPES),
}


def autotune(task: Task) -> Finding:
    """Try every shape for every kernel and kind of factors; write the fastest to the cache."""
    path = cache_path(torch.cuda.get_device_name())
    limit_s = task.left_s() - SPARE_S
    return tune(torch.device("cuda"), path, FACTORS, ROWS, WIDTH, limit_s=limit_s)


def tune(
    device: torch.device,
    path: Path,
    kinds: Mapping[str, Factors],
    rows: int,
    width: int,
    *,
    limit_s: float = math.inf,
) -> Finding:
    """Time each kernel's shapes in a whole loss; those that compute it wrong do not count."""
    ends = time.monotonic() + limit_s
    seconds: dict[str, dict[str, float | str]] = {}
    best: Table = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for factors in kinds.values():
            torch.backends.cuda.matmul.allow_tf32 = factors.tf32
            features = _features(rows, width, device, factors.features)
            for kernel, loss in KERNELS.items():
                name = key(kernel, factors.dtype, tf32=factors.tf32)
                right = _gradients(loss, "tiled", features, factors)
                timed: dict[Blocks, float] = {}
                seconds[name] = {}
                for shape in factors.shapes:
                    if time.monotonic() > ends:
                        break
                    TRIED[name] = shape
                    found = _try(loss, features, right, factors)
                    seconds[name][str(tuple(shape))] = found
                    if isinstance(found, float):
                        timed[shape] = found
                TRIED.pop(name, None)
                if timed:
                    best[name] = TRIED[name] = min(timed, key=lambda shape: timed[shape])
    finally:
        TRIED.clear()
        torch.backends.cuda.matmul.allow_tf32 = before
    figures: dict[str, Any] = {"seconds": seconds, "path": str(path), "best": best}
    if not best:
        return Finding(False, "no shape runs and is right; nothing was written", figures)
    write_blocks(path, {**read_blocks(path), **best})
    words = ", ".join(f"{name} {tuple(shape)}" for name, shape in best.items())
    return Finding(True, f"{words}; wrote {path}", figures)


def _try(loss: str, features: list[Tensor], right: list[Tensor], factors: Factors) -> float | str:
    """Return the seconds of the loss, or how it fails."""
    try:
        found = _gradients(loss, "fused", features, factors)
        error = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True)
        )
        if not error <= factors.close:
            return f"wrong: {error:.1e}"
        step = time_on_device(
            lambda: _gradients(loss, "fused", features, factors), features[0].device
        )
        return step.wall_s
    except Exception as error:  # whatever the compiler or the driver raises
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _gradients(loss: str, kernels: str, features: list[Tensor], factors: Factors) -> list[Tensor]:
    options = LossOptions(kernels=kernels, bf16_products=factors.bf16_products)
    scale = torch.full((1,), 1 / 0.07, device=features[0].device).log()
    bias = torch.full((1,), -10.0, device=features[0].device)
    value = global_loss(loss, features[0], features[1], scale, bias, options).loss
    return [x.float() for x in (value.detach(), *torch.autograd.grad(value, features))]


def _features(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(2, rows, width, generator=generator)
    made[1] += 0.5 * made[0]
    unit = torch.nn.functional.normalize(made, dim=2).to(device, dtype)
    return [x.clone().requires_grad_() for x in unit.unbind()]
