"""In which floating-point type what is computed.

What leaves a trunk or a head is float32, or float64 where the model is (`dist-vse verify`).
"""

import contextlib

import torch
from torch import Tensor

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions of a run that autocast to a half type."""


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision, such as autocast leaves it; keep float32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the block in which a model runs in `engine.precision`."""
    dtype = HALVES.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def use_precision(device: torch.device, precision: str) -> None:
    """Have a GPU compute float32 products and convolutions as `engine.precision` says.

    fp32 means float32: PyTorch's default lets cuDNN's convolutions round to TF32 even there. tf32
    allows TF32, and so do bf16 and fp16 for the little that autocast leaves in float32.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
        torch.backends.cudnn.allow_tf32 = precision != "fp32"


def evaluation_autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the block in which a run is evaluated: a CPU stays in float32."""
    return autocast(device, precision if device.type == "cuda" else "fp32")


def float32_rnn(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return the block in which an RNN takes `x` on a GPU in the precision that `x` has.

    Autocast runs cuDNN's RNNs in float16 even where it was asked for bfloat16, and without loss
    scaling their gradients underflow. A CPU has no such rule. In an fp16 run they are float32 too.
    """
    return torch.autocast("cuda", enabled=False) if x.is_cuda else contextlib.nullcontext()
