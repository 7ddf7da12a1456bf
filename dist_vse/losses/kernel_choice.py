"""What computes a loss, fused kernels or tiles, and the shapes of the kernels' tiles."""

from functools import cache
from importlib.util import find_spec

import torch

from dist_vse.common.log import logger
from dist_vse.losses.tuned_blocks import Blocks, Table, cache_path, key, read_blocks

# Chosen from registers and spills of compiled code (tests/losses/test_fused_compiled.py); no time
# was measured. A column lies across the threads, so tall tiles have fewer steps to reduce it.
HOPPER = {
    "softmax_sums": Blocks(256, 128, 64, 8, 3),
    "hardest": Blocks(256, 128, 64, 8, 3),
    "weights": Blocks(128, 128, 64, 8, 3),
    "pair_sums": Blocks(128, 128, 64, 8, 3),
}
DEFAULT = Blocks(128, 128, 32, 8, 3)
FLOAT32 = Blocks(64, 64, 32, 8, 3)
INTERPRETED = Blocks(16, 32, 16, 1, 1)
TRIED: Table = {}
"""What is tried now, in place of everything else; only autotuning fills it."""


def blocks_on(kernel: str, dtype: torch.dtype, device: torch.device, *, tf32: bool) -> Blocks:
    """Return the blocks of a kernel on a device: timed ones where there are any."""
    name = key(kernel, dtype, tf32=tf32)
    if tried := TRIED.get(name):
        return tried
    if device.type != "cuda":
        return INTERPRETED
    timed = read_blocks(cache_path(torch.cuda.get_device_name(device)))
    default = blocks_of(kernel, dtype, torch.cuda.get_device_capability(device))
    return timed.get(name, default)


def blocks_of(kernel: str, dtype: torch.dtype, capability: tuple[int, int]) -> Blocks:
    """Return the blocks of a kernel on a GPU of some compute capability."""
    if dtype == torch.float32:
        return FLOAT32
    return HOPPER[kernel] if capability[0] == 9 else DEFAULT


def choose_kernels(
    wanted: str,
    has_kernels: bool,
    dtype: torch.dtype,
    device: torch.device,
    *,
    only_tiled: str | None = None,
) -> tuple[str, str]:
    """Return what computes a loss, `fused` or `tiled`, and why.

    `wanted` is `loss.kernels`, `has_kernels` whether the loss has fused ones, `dtype` that of the
    statistics, `only_tiled` what fused kernels can't do of all that is asked. The interpreter runs
    only if it is asked for, by `fused`.
    """
    if wanted == "tiled":
        return "tiled", "loss.kernels=tiled"
    obstacles = {
        "the loss has no fused kernels": not has_kernels,
        f"features are {dtype}": dtype != torch.float32,
        "Triton is not installed": find_spec("triton") is None,
    }
    obstacle = next((reason for reason, holds in obstacles.items() if holds), None)
    if obstacle is None:
        if device.type == "cuda" and torch.cuda.is_available():
            if torch.cuda.get_device_capability(device) < (8, 0):
                obstacle = "the GPU's compute capability is below 8.0"
        elif wanted == "auto" or not _interpreted():
            obstacle = f"the device is {device.type}"
    obstacle = obstacle or only_tiled
    return ("tiled", obstacle) if obstacle else ("fused", f"loss.kernels={wanted}")


@cache
def log_choice(wanted: str, kernels: str, reason: str) -> None:
    """Log once what computes the loss."""
    level = logger.warning if wanted == "fused" and kernels == "tiled" else logger.info
    level(f"the loss runs in {kernels} kernels ({reason})")


def _interpreted() -> bool:
    """Say whether Triton's interpreter runs the kernels, as TRITON_INTERPRET=1 asks for."""
    import triton

    return bool(triton.knobs.runtime.interpret)
