"""What changes along a run, as functions of the pairs seen: they fit any batch size."""

import math
from collections.abc import Callable

from dist_vse.config import OptimConfig


def _constant(_: float) -> float:
    return 1.0


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _step(progress: float) -> float:
    return 1.0 if progress < 0.5 else 0.1


def _linear(progress: float) -> float:
    return 1.0 - progress


_COURSES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "cosine": _cosine,  # https://arxiv.org/abs/1608.03983, without restarts
    "linear": _linear,
    "step": _step,  # VSE++ lowers the rate to a tenth half-way, https://arxiv.org/abs/1707.05612
}


def learning_rate(samples_seen: int, optim: OptimConfig, *, total_samples: int) -> float:
    """Return the rate of the step that starts after `samples_seen` pairs.

    It rises linearly to its peak over the warm-up; then the schedule runs to the end. `wsd` stays
    at the peak until the cool-down (https://arxiv.org/abs/2404.06395).
    """
    warmup = optim.warmup_samples
    if samples_seen < warmup:
        return optim.lr * (samples_seen + 1) / (warmup + 1)
    if optim.schedule == "wsd":
        left = (total_samples - samples_seen) / optim.cooldown_samples
        course = max(0.0, min(1.0, left))
    else:
        progress = (samples_seen - warmup) / max(1, total_samples - warmup)
        course = _COURSES[optim.schedule](min(1.0, progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * course


def warmup_fraction(samples_seen: int, warmup_samples: int) -> float:
    """Return how far a linear warm-up has come: 0 at its start, 1 at its end and without one."""
    return 1.0 if warmup_samples == 0 else min(1.0, samples_seen / warmup_samples)


def temperature(samples_seen: int, *, start: float, end: float, total_samples: int) -> float:
    """Return t of the step after `samples_seen` pairs: a cosine from start to end."""
    return end + (start - end) * _cosine(min(1.0, samples_seen / max(1, total_samples)))
