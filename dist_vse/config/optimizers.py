"""The optimizers: one table entry each, and the config's section that chooses one.

To add an optimizer, add an entry to `OPTIMIZERS`. The engine builds it from there, `dist-vse
doctor` and `dist-vse plan` read its memory there, and the check of the launcher's settings reads
its name and settings there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dist_vse.config.checks import at_least, check, one_of, share

SCHEDULES = ("constant", "cosine", "step")
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class GroupConfig:
    """Parameters with a rate or a weight decay of their own (an item of `optim.groups`)."""

    match: str = ""
    """A part of the model (`image`, `text.trunk`, `image.head`) or a glob over the names of
    parameters (`*.norm*`). Where several items match, the last one counts."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    weight_decay: float | None = None
    """In the place of `optim.weight_decay`, for those that decay at all."""

    def __post_init__(self) -> None:
        check(bool(self.match), "optim.groups: an item needs match, such as image.trunk")
        check(
            self.lr_scale > 0,
            f"optim.groups: lr_scale ({self.lr_scale}) of {self.match} must be above 0; "
            "model.image.frozen and model.text.frozen keep a trunk as it is",
        )
        at_least(0, **{"optim.groups: weight_decay": self.weight_decay or 0.0})


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the learning rate's course, in samples so that it fits any batch."""

    name: str = "adamw"
    """adamw, adam or sgd."""
    lr: float = 5e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Not applied to biases, norms and the temperature."""
    decay_positions: bool = True
    """Whether it applies to position and class embeddings, and to what a timm model's
    `no_weight_decay()` names. Most recipes say false."""
    groups: list[GroupConfig] = field(default_factory=list)
    """Rates and weight decay of parts: `[{match: image.trunk, lr_scale: 0.1, weight_decay: 0}]`."""
    layer_decay: float = 1.0
    """Factor on the rate from each layer of a trunk to the one before it; the heads have 1."""
    beta1: float = 0.9
    """For adamw and adam."""
    beta2: float = 0.999
    """For adamw and adam."""
    momentum: float = 0.0
    """For sgd."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 is off (DeepSpeed's own default would be 1.0)."""
    schedule: str = "cosine"
    """constant; cosine to zero; step: a tenth after half of the run."""
    warmup_samples: int = 0
    """Pairs seen while the learning rate rises from 0."""

    def __post_init__(self) -> None:
        one_of("optim.name", self.name, tuple(OPTIMIZERS))
        one_of("optim.schedule", self.schedule, SCHEDULES)
        check(self.lr > 0, f"optim.lr ({self.lr}) must be above 0")
        at_least(0, optim__clip_norm=self.clip_norm, optim__momentum=self.momentum)
        at_least(0, optim__weight_decay=self.weight_decay)
        at_least(0, optim__warmup_samples=self.warmup_samples)
        check(
            0 < self.layer_decay <= 1,
            f"optim.layer_decay ({self.layer_decay}) must be above 0 and at most 1",
        )
        share(optim__beta1=self.beta1, optim__beta2=self.beta2)


@dataclass(frozen=True)
class OptimizerSpec:
    """What the package knows of an optimizer."""

    factory: str
    """Where its class is, `module:class`. It takes parameter groups, `lr` and `settings`."""
    deepspeed_type: str
    """Its `optimizer.type` in a DeepSpeed JSON file; upper and lower case are the same."""
    settings: Callable[[OptimConfig], dict[str, Any]]
    """Its own keyword arguments, besides the learning rate and weight decay."""
    state_tensors: Callable[[OptimConfig], int]
    """How many numbers it keeps for each parameter that it trains."""
    fuses: bool = False
    """Whether its class takes `fused=True` on a GPU."""


def _adam_settings(optim: OptimConfig) -> dict[str, Any]:
    return {"betas": (optim.beta1, optim.beta2), "eps": ADAM_EPS}


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(
        factory="torch.optim:AdamW",
        deepspeed_type="adamw",
        settings=_adam_settings,
        state_tensors=lambda optim: 2,  # both moments
        fuses=True,
    ),
    "adam": OptimizerSpec(
        factory="torch.optim:Adam",
        deepspeed_type="adam",
        settings=_adam_settings,
        state_tensors=lambda optim: 2,
        fuses=True,
    ),
    "sgd": OptimizerSpec(
        factory="torch.optim:SGD",
        deepspeed_type="sgd",
        settings=lambda optim: {"momentum": optim.momentum},
        state_tensors=lambda optim: 1 if optim.momentum > 0 else 0,
    ),
}


def state_tensors(optim: OptimConfig) -> int:
    """Return how many numbers the chosen optimizer keeps for each parameter that it trains."""
    return OPTIMIZERS[optim.name].state_tensors(optim)
