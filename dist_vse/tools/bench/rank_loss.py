"""A rank's share of a loss over a large batch, timed on one device, compared with others' losses.

The other ranks are pretended: their captions are there, and the network takes no time. b rows on
the rank, N on all, W ranks, d embedding.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dist_vse.common.units import GIB
from dist_vse.distributed.pretend import pretended_group
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.losses.options import LossOptions
from dist_vse.tools.bench.device_time import time_on_device
from dist_vse.tools.verify.peer import peer_losses

RANKS = 8
TEMPERATURE = 0.07
BARE = "one bare product"
OPEN_CLIP = "OpenCLIP, autocast"
STRIP = 8192  # columns of the bare product that are in memory at a time

LossStep = Callable[[Tensor, Tensor], Tensor]
"""(image features (b, d), text features (b, d)) -> what this rank minimises."""


def our_losses() -> dict[str, LossStep]:
    """Return this project's losses, in kernels and in tiles, as a run in bfloat16 has them."""
    return {
        f"{name}, {kernels}": _ours(name, kernels)
        for name in ("convse", "convse++", "siglip")
        for kernels in ("fused", "tiled")
    }


def time_losses(
    rows: int,
    width: int,
    device: torch.device,
    *,
    peers: Callable[[], Mapping[str, LossStep]] = dict,
    repeats: int = 3,
) -> dict[str, dict[str, Any]]:
    """Time forward and backward of every loss in the share of one of 8 ranks.

    Returns for each the fields of DeviceTime, or `error` where it failed, such as for memory.
    `peers` is called within the group.
    """
    found: dict[str, dict[str, Any]] = {}
    with pretended_group(RANKS):
        features = _features(rows, width, device)
        for name, loss in {**our_losses(), **peers()}.items():
            found[name] = _timed(lambda loss=loss: _differentiate(loss, features), device, repeats)  # type: ignore[misc]
        images, captions = (x.detach().bfloat16() for x in features)
        found[BARE] = _timed(lambda: _bare_product(images, captions), device, repeats)
    return found


def open_clip_loss(device: torch.device) -> dict[str, LossStep]:
    """Return OpenCLIP's with the flags that are exact, under its autocast; nothing if missing."""
    exact = peer_losses().get("local_loss=True, gather_with_grad=True")
    if exact is None:
        return {}

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return exact(images, texts, images.new_full((1,), -math.log(TEMPERATURE)))

    return {OPEN_CLIP: loss}


def _ours(name: str, kernels: str) -> LossStep:
    options = LossOptions(bf16_products=True, kernels=kernels)

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        scale = images.new_full((1,), -math.log(TEMPERATURE))
        return GlobalLoss(name, options)(images, texts, scale, images.new_full((1,), -10.0)).loss

    return loss


def _features(rows: int, width: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(2, rows, width, generator=generator).to(device)
    made[1] += 0.5 * made[0]  # a caption resembles its image
    unit = torch.nn.functional.normalize(made, dim=2)
    return [x.clone().requires_grad_() for x in unit.unbind()]


def _differentiate(loss: LossStep, features: list[Tensor]) -> None:
    torch.autograd.grad(loss(*features), features)


def _bare_product(images: Tensor, captions: Tensor) -> None:
    """Compute all similarities (b, N), a strip after the other into the same memory."""
    step = min(STRIP, len(captions))
    out = images.new_empty(len(images), step)
    for _ in range(RANKS):
        for start in range(0, len(captions) - step + 1, step):
            torch.mm(images, captions[start : start + step].T, out=out)


def _timed(work: Callable[[], None], device: torch.device, repeats: int) -> dict[str, Any]:
    try:
        timed = time_on_device(work, device, repeats=repeats)
    except (torch.OutOfMemoryError, NotImplementedError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        **asdict(timed),
        "device_share": timed.device_share,
        "peak_gib": timed.peak_bytes / GIB,
    }
