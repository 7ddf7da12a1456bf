"""Checks 8 and 14: how fast the losses are, and that kernels compute what tiles do."""

import itertools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.losses.global_loss import global_loss
from dist_vse.losses.kernel_choice import choose_kernels
from dist_vse.losses.options import LossOptions
from dist_vse.losses.registry import LOSSES, find_loss
from dist_vse.tools.bench.rank_loss import (
    BARE,
    OPEN_CLIP,
    RANKS,
    open_clip_loss,
    time_losses,
)

SIZES = ((4096, 512), (16384, 512))  # rows a rank and embedding, on a GPU
SMALL = ((12, 16),)
MAIN = "convse, fused"  # what the words are about

TEMPERATURES = (0.07, 0.005)
COUNTS = {True: (300, 1, 700), False: (40,)}  # pairs: an edge, and several tiles
WIDTH = 72
CLOSE = {"fp32": 1e-3, "bf16": 2**-5}  # relative to the largest number; float32 is tf32x3


def check_loss(task: Task) -> Finding:
    """Time each loss in kernels and in tiles, against OpenCLIP's and one bare product."""
    device = torch.device("cuda" if task.on_gpu else "cpu")
    if task.on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = True  # as in a bfloat16 run
    tables: dict[str, Any] = {}
    for rows, width in SIZES if task.on_gpu else SMALL:
        name = f"b={rows} N={rows * RANKS} d={width}"
        tables[name] = time_losses(
            rows,
            width,
            device,
            peers=lambda: open_clip_loss(device),
            repeats=3 if task.on_gpu else 1,
        )
    # On a CPU the kernels run in the interpreter, and only that all run is looked at.
    failed = sorted(
        f"{name}: {loss}, {one['error']}"
        for name, table in tables.items()
        for loss, one in table.items()
        if "error" in one and "OpenCLIP" not in loss
    )
    if failed:
        return Finding(False, "; ".join(failed), {"losses": tables})
    parts = [_in_words(name, table) for name, table in tables.items()]
    return Finding(True, "; ".join(parts), {"losses": tables})


def compile_timed(task: Task) -> Finding:
    """Compile the kernels of check 8; they are the same for any number of rows."""
    device = torch.device("cuda" if task.on_gpu else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    width = SIZES[0][1] if task.on_gpu else SMALL[0][1]
    time_losses(SMALL[0][0], width, device, repeats=1)
    return Finding(True, "")


def _in_words(name: str, table: dict[str, Any]) -> str:
    def ms(loss: str) -> str:
        return f"{table[loss]['wall_s'] * 1e3:.2f} ms" if "wall_s" in table.get(loss, {}) else "-"

    shown = (MAIN, "convse, tiled", "convse++, fused", OPEN_CLIP, BARE)
    return f"{name}: " + ", ".join(f"{loss} {ms(loss)}" for loss in shown)


def check_kernels(task: Task) -> Finding:
    """Compare fused kernels with tiles and with the dense loss in float64.

    With ties, duplicates of both kinds, one pair, ragged edges and a low temperature.
    """
    device = distributed.device()
    if find_spec("triton") is None:
        return Finding(not task.on_gpu, "Triton is not installed: losses run in tiles")
    errors: dict[str, float] = {}
    capable = [name for name in LOSSES if find_loss(name).fused is not None]
    counts = COUNTS[task.on_gpu][:1] if task.warm_up else COUNTS[task.on_gpu]
    for name, count in itertools.product(capable, counts):
        chosen, reason = choose_kernels("fused", True, torch.float32, device)
        if chosen != "fused":
            return Finding(False, f"the fused kernels do not run here: {reason}")
        for temperature, duplicates in zip(TEMPERATURES, ("mask", "positive"), strict=True):
            for precision in CLOSE:
                case = f"{name}, {count} pairs, t={temperature}, {duplicates}, {precision}"
                options = LossOptions(
                    duplicates=duplicates, kernels="fused", bf16_products=precision == "bf16"
                )
                # Rounding to bfloat16 may choose another hardest, and a low temperature magnifies.
                if precision == "bf16" and (temperature < 0.05 or find_loss(name).has_warmup):
                    continue
                error = _error(name, count, temperature, options, device)
                errors[case] = error / CLOSE[precision]
    off = {case: error for case, error in errors.items() if not error <= 1}
    figures = {"of_tolerance": errors, "off": off}
    if off:
        first = next(iter(off))
        return Finding(False, f"{len(off)} of {len(errors)} are off: {first}", figures)
    where = "here" if task.on_gpu else "in Triton's interpreter"
    words = (
        f"{len(errors)} cases of {len(capable)} losses equal the dense loss in float64 {where}, at "
        f"most {max(errors.values()):.2f} of their tolerance"
    )
    return Finding(True, words, figures)


def compile_checked(task: Task) -> Finding:
    """Compile the kernels of check 14 by a part of it; they are the same for any number of rows."""
    return Finding(True, "", check_kernels(task).figures)


def _error(
    name: str, count: int, temperature: float, options: LossOptions, device: torch.device
) -> float:
    """Return the largest error of value and gradients, relative to the largest number of each."""
    generator = torch.Generator().manual_seed(count)
    made = torch.randn(2, count, WIDTH, generator=generator, dtype=torch.float64)
    if count > 20:  # ties: copies in one tile and across tiles
        made[:, [12, count - 1]] = made[:, [9, 9]]
    unit = torch.nn.functional.normalize(made, dim=2).to(device)
    if options.bf16_products:  # so that what is left is the products' own error
        unit = unit.bfloat16().double()
    ids = torch.arange(count)
    ids[count // 2 :] = ids[: count - count // 2].clone() if count > 20 else ids[count // 2 :]
    scale = torch.tensor([1 / temperature], device=device).log()
    bias = torch.tensor([-5.0], device=device)

    def gradients(compute: Any, dtype: torch.dtype, of_ids: Tensor) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in unit.unbind()]
        result = compute(name, *leaves, scale.to(dtype), bias.to(dtype), options, image_ids=of_ids)
        loss = result if isinstance(result, Tensor) else result.loss
        return [loss.detach().double(), *torch.autograd.grad(loss.sum(), leaves)]

    ours = gradients(global_loss, torch.float32, ids)
    exact = gradients(dense_loss, torch.float64, ids.to(device))
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-6))
        for a, b in zip(ours, exact, strict=True)
    )
