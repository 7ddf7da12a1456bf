"""Floating-point operations of a step, and what share of a GPU's peak they make (MFU).

Counted are the model's own: its forward and backward for every pair and every text without an
image, and the loss's three matrix products. What gradient caching does twice is not counted, as in
the usual definition (Chowdhery et al., PaLM, 2022, https://arxiv.org/abs/2204.02311, appendix B).
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from dist_vse.common.random_state import random_state, replay
from dist_vse.models.dual_encoder import DualEncoder, frozen_statistics, made_up_pairs

# Dense peaks (no sparsity) of NVIDIA's data sheets, in 10^12 a second: bfloat16 on tensor cores,
# float32 without them. The first name that a device's contains counts.
_PEAKS = {
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H800": (989, 67),
    "A100": (312, 19.5),
    "A800": (312, 19.5),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "A40": (150, 37.4),
    "A10": (125, 31.2),
    "V100": (None, 15.7),
    "T4": (None, 8.1),
}
_PAIRS = (2, 4)  # to count on


@dataclass(frozen=True)
class Flops:
    """Operations that a pair, or a text without an image, costs the encoders."""

    forward: float
    backward: float
    negative: float = 0.0
    """Of such a text: forward and backward."""

    def of_step(self, global_batch: int, embedding: int, negatives: float = 0) -> float:
        """Return those of a step of all ranks, which bring so many texts without an image."""
        loss = 3 * 2 * float(global_batch) * (global_batch + negatives) * embedding
        pairs = global_batch * (self.forward + self.backward)
        return pairs + negatives * self.negative + loss


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the operations that the device can do in a second; None where that is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float | None:
    """Return the peak of a GPU by its name, in a precision of `engine.precision`."""
    found = next((peaks for gpu, peaks in _PEAKS.items() if gpu in name), None)
    bf16, fp32 = found or (None, None)
    tf32 = fp32 if bf16 is None else bf16 / 2  # on the same tensor cores, for twice the bytes
    peak = {"bf16": bf16, "fp16": bf16, "tf32": tf32, "fp32": fp32}[precision]
    return None if peak is None else peak * 1e12


def count_flops(
    model: DualEncoder, image_size: int, num_tokens: int, *, negatives: bool = False
) -> Flops:
    """Count by encoding few made-up pairs and differentiating; leaves no trace.

    With `negatives`, also what a text without an image costs. Call it before an engine stands
    around the model. A frozen trunk counts forward only.
    """

    def of_pair(negatives: int) -> tuple[float, float]:
        few, more = (
            _count(model, rows, image_size=image_size, num_tokens=num_tokens, negatives=negatives)
            for rows in _PAIRS
        )
        pairs = _PAIRS[1] - _PAIRS[0]
        return (more[0] - few[0]) / pairs, (more[1] - few[1]) / pairs

    plain = of_pair(0)
    return Flops(*plain, negative=sum(of_pair(1)) - sum(plain) if negatives else 0.0)


def _count(model: DualEncoder, rows: int, **sizes: int) -> tuple[int, int]:
    """Return the operations of forward and backward; `sizes` are those of `made_up_pairs`."""
    here = next(model.parameters()).device
    made_up = made_up_pairs(model, rows, **sizes)
    pairs = {name: value.to(here) for name, value in made_up.items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    with replay(random_state()), frozen_statistics(model):
        with FlopCounterMode(display=False) as forward:
            outputs = model(**model.prepare(**pairs))
            total = torch.stack([output.sum() for output in outputs]).sum()
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(total, parameters, allow_unused=True)
    return forward.get_total_flops(), backward.get_total_flops()
