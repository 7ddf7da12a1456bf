"""The optimizers: one table entry each, and the config's section that chooses one.

To add an optimizer, add an entry to `OPTIMIZERS`. The engine builds it from there, `dist-vse
doctor` and `dist-vse plan` read its memory there, and the check of the launcher's settings reads
its name and settings there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dist_vse.config.checks import at_least, check, one_of, share

SCHEDULES = ("constant", "cosine", "linear", "wsd", "step")
_DECAYS = ("cosine", "linear", "wsd")
ADAM_EPS = 1e-8
_TIMM = "timm.optim:create_optimizer_v2"


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
    """adamw, adam, sgd (PyTorch's), or an optimizer of timm's, such as lion, lamb or muon. One that
    needs whole tensors (lamb, lars, muon, adafactor …) needs engine.zero_stage=0."""
    options: dict[str, Any] = field(default_factory=dict)
    """The optimizer's own arguments, such as `{eps: 1.0e-6}` or `{betas: [0.9, 0.98]}`; what is
    left out has the default of its library."""
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
    """For adamw and adam; others take `options`."""
    beta2: float = 0.999
    """For adamw and adam; others take `options`."""
    momentum: float = 0.0
    """For sgd; others take `options`."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 is off (DeepSpeed's own default would be 1.0)."""
    schedule: str = "cosine"
    """constant; cosine or linear to min_lr; wsd (warm-up, stable, decay): constant, then linear to
    min_lr over the last cooldown_samples; step: a tenth after half of the run."""
    min_lr: float = 0.0
    """Where cosine, linear and wsd end."""
    cooldown_samples: int = 0
    """Pairs at the end of the run over which wsd decays."""
    warmup_samples: int = 0
    """Pairs seen while the learning rate rises from 0."""

    def __post_init__(self) -> None:
        one_of("optim.name", self.name, tuple(OPTIMIZERS))
        for key in ("beta1", "beta2", "momentum"):
            check(
                not OPTIMIZERS[self.name].from_timm
                or getattr(self, key) == getattr(type(self), key),
                f"optim.{key} is not for {self.name}: give its own arguments in optim.options",
            )
        own = {"lr", "weight_decay", "opt", "params"} & {*map(str, self.options)}
        check(not own, f"optim.options: {', '.join(sorted(own))} is a key of optim itself")
        one_of("optim.schedule", self.schedule, SCHEDULES)
        check(self.lr > 0, f"optim.lr ({self.lr}) must be above 0")
        at_least(0, optim__clip_norm=self.clip_norm, optim__momentum=self.momentum)
        at_least(0, optim__weight_decay=self.weight_decay)
        at_least(0, optim__warmup_samples=self.warmup_samples)
        check(
            0 <= self.min_lr <= self.lr and (self.min_lr == 0 or self.schedule in _DECAYS),
            f"optim.min_lr ({self.min_lr}) must be between 0 and optim.lr, and is for "
            f"{', '.join(_DECAYS)}",
        )
        check(
            (self.cooldown_samples > 0) == (self.schedule == "wsd"),
            f"optim.cooldown_samples ({self.cooldown_samples}) must be above 0 for "
            f"optim.schedule=wsd, and is for no other (it is {self.schedule})",
        )
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
    whole_tensors: bool = False
    """Whether a step of part of a tensor differs: it takes norms, ranks or products of the whole,
    or counts steps where pieces lose it. ZeRO 1 to 3 hand over flat pieces of many parameters."""
    second_group: bool = False
    """Whether it steps embeddings by another rule, in groups with `use_fallback`."""

    @property
    def from_timm(self) -> bool:
        """Whether timm builds it, by the name that it has there."""
        return self.factory == _TIMM


def _adam_settings(optim: OptimConfig) -> dict[str, Any]:
    return {"betas": (optim.beta1, optim.beta2), "eps": ADAM_EPS, **optim.options}


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
        settings=lambda optim: {"momentum": optim.momentum, **optim.options},
        state_tensors=lambda optim: 1 if optim.momentum > 0 else 0,
    ),
}


_ELEMENTWISE = {  # of timm, with the tensors that each keeps for a parameter
    "adadelta": 2, "adamax": 2, "adamc": 2, "adopt": 2, "adoptw": 2, "adoptc": 2, "lion": 1,
    "lionc": 1, "momentum": 1, "nadam": 2, "nadamc": 2, "nadamw": 2, "nesterov": 1, "nesterovw": 1,
    "radam": 2, "radamw": 2, "rmsprop": 2, "rmsproptf": 2, "rmsproptfc": 2, "rmsproptfw": 2,
    "sgdc": 1, "sgdw": 1,
}  # fmt: skip
_WHOLE_TENSORS = {
    "adabelief": 2, "adafactor": 1, "adafactorbv": 1, "adafactorbvc": 1, "adagrad": 1, "adamp": 2,
    "adamuon": 2, "adan": 4, "adanw": 4, "cadafactor": 2, "cadafactorbv": 2, "cadafactorbvc": 2,
    "cadamc": 2, "cadamp": 2, "cadamw": 2, "cadan": 4, "cadanw": 4, "cadopt": 2, "cadoptc": 2,
    "cadoptw": 2, "clamb": 2, "clambw": 2, "claprop": 2, "clion": 1, "clionc": 1, "cmars": 3,
    "cnadamc": 2, "cnadamw": 2, "crmsproptf": 2, "csgdc": 1, "csgdp": 1, "csgdw": 1, "lamb": 2,
    "lambc": 2, "lambcd": 2, "lambcw": 2, "lambw": 2, "laprop": 2, "lapropc": 2, "larc": 1,
    "lars": 1, "madgrad": 3, "madgradw": 3, "mars": 3, "muon": 1, "nadamuon": 2, "nlarc": 1,
    "nlars": 1, "nmuon": 1, "novograd": 1, "novogradc": 1, "novogradw": 1, "radabelief": 2,
    "sgdp": 1,
}  # fmt: skip


def _timm(name: str, tensors: int, *, whole_tensors: bool) -> OptimizerSpec:
    return OptimizerSpec(
        factory=_TIMM,
        deepspeed_type=name,
        settings=lambda optim: {"opt": name, **optim.options},
        state_tensors=lambda optim: tensors,
        whole_tensors=whole_tensors,
        second_group="muon" in name,
    )


OPTIMIZERS |= {name: _timm(name, n, whole_tensors=False) for name, n in _ELEMENTWISE.items()}
OPTIMIZERS |= {name: _timm(name, n, whole_tensors=True) for name, n in _WHOLE_TENSORS.items()}


def needs_whole_tensors(optim: OptimConfig) -> bool:
    """Return whether the chosen optimizer can't step the flat pieces of ZeRO 1 to 3."""
    return OPTIMIZERS[optim.name].whole_tensors


def state_tensors(optim: OptimConfig) -> int:
    """Return how many numbers the chosen optimizer keeps for each parameter that it trains."""
    return OPTIMIZERS[optim.name].state_tensors(optim)
