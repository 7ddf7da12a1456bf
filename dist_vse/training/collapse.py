"""Says when all features of a training are nearly the same vector, with advice for its loss."""

from collections.abc import Mapping

from torch import Tensor

from dist_vse.config import LossConfig
from dist_vse.losses.registry import find_loss

EARLY = 0.1
"""Share of a run before which features that have never spread are no news: those of random weights
are nearly equal, whatever the loss."""
NEAR = -0.1
"""Uniformity above which features are nearly the same vector; of spread ones it is -2 to -4."""


class CollapseWatch:
    """Looks at the logged statistics; warns once each time that the features are nearly equal."""

    def __init__(self, loss: LossConfig, horizon: int) -> None:
        """Watch a run of `horizon` samples from here on."""
        self._loss, self._horizon = loss, horizon
        self._spread = self._told = False

    def look(self, stats: Mapping[str, Tensor | float], samples_seen: int) -> str | None:
        """Return a warning where there is something new to say."""
        positive, hardest = float(stats["positive_similarity"]), float(stats["hardest_similarity"])
        uniformity = float(stats["uniformity"])
        if uniformity < NEAR or abs(positive - hardest) > 0.05:
            self._spread, self._told = True, False
            return None
        in_warmup = self._has_warmup and samples_seen < self._loss.warmup_samples
        waiting = not self._spread and (in_warmup or samples_seen < EARLY * self._horizon)
        if self._told or waiting:
            return None
        self._told = True
        what = "the features have collapsed" if self._spread else "the features have not spread yet"
        return (
            f"{what}: all are nearly the same vector (uniformity {uniformity:.3f}, positives "
            f"{positive:.3f}, hardest negatives {hardest:.3f}); {self._advice()}"
        )

    @property
    def _has_warmup(self) -> bool:
        return find_loss(self._loss.name).has_warmup

    def _advice(self) -> str:
        """Name settings that this run has: the losses of hardest negatives have a warm-up."""
        if self._has_warmup:
            how = f"raise loss.warmup_samples ({self._loss.warmup_samples}) or lower optim.lr"
            return f"{how}: {self._loss.name} takes the hardest negative alone after its warm-up"
        if self._spread:
            return "lower optim.lr, or go on from an earlier checkpoint"
        return "watch whether the loss falls; if it stays, try another optim.lr"
