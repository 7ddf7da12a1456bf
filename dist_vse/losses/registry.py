"""The losses: what the system knows of each, in one entry.

Config, training, verify, the report and the plan read it from here. To add a loss, write its
formula (reference.py), its term (a file beside this one) and an entry below. A loss of your own
needs no change here: `loss.name=my_module:MY_LOSS` names a LossSpec of yours, and so does an
entry point of the group `dist_vse.losses`.

Nothing here imports torch: functions are named as "module:function" and imported at first use.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from dist_vse.common.errors import UserError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from dist_vse.losses.reference import DensePairs
    from dist_vse.losses.tiled import TermInputs, Terms

ENTRY_POINTS = "dist_vse.losses"
LN2 = math.log(2)


@dataclass(frozen=True)
class LossCost:
    """What the plan must know of a loss, besides its products."""

    dense_gradient: bool = True
    """Whether the gradient touches every pair, so that tiles are kept or computed again."""
    gathers: int = 1
    """All-gathers of one float32 number a pair."""
    reduces: tuple[int, ...] = (1,)
    """All-reduces, each of so many float32 numbers a pair."""


@dataclass(frozen=True)
class LossSpec:
    """One loss: s are the cosines of all pairs, t is the temperature, N the global batch."""

    name: str
    label: str
    """As papers write it."""
    paper: str
    dense: "str | Callable[[DensePairs], Tensor]"
    """The loss of one process that holds all N x N similarities: the oracle of tests and verify."""
    terms: "str | Callable[[TermInputs], Terms]"
    """The same, tile by tile: what training runs."""
    fused: "str | Callable[[TermInputs], Any] | None" = None
    """The terms with what fused kernels find for them (fused.Epilogues); None runs the tiles on
    every device."""
    similarity_unit: "Callable[[Tensor], Tensor] | None" = None
    """What the terms' cosines are multiplied by, given 1/t; None leaves them as they are."""
    loss_unit: "Callable[[Tensor, int], Tensor | float]" = lambda scale, n: 1.0
    """What the sum of all terms is multiplied by, given 1/t and N."""
    positives_compete: bool = False
    """Whether positives stay among the candidates that the terms see (as in a softmax)."""
    learns_bias: bool = False
    has_warmup: bool = False
    """Whether `loss.warmup_samples` moves it from the mean of all violations to the hardest."""
    captions_in_bf16: bool = False
    """Whether captions may travel in bfloat16 where products are bfloat16: the gradient must be
    made of products alone, not of the features themselves."""
    takes_negatives: bool = False
    """Whether texts without an image may be further columns (negatives.py): a term's columns are
    then `positives.num_columns`, of which only the captions count as columns."""
    cost: LossCost = LossCost()

    def caption_bytes(self, *, bf16_products: bool) -> int:
        """Return the bytes of a number of a caption's features on its way to other ranks."""
        return 2 if bf16_products and self.captions_in_bf16 else 4

    def dense_loss(self, pairs: "DensePairs") -> "Tensor":
        """Return the loss of one process that has all pairs."""
        loss: Tensor = _imported(self.dense)(pairs)
        return loss

    def build_terms(self, inputs: "TermInputs") -> "Terms":
        """Return what the tiled pass runs."""
        terms: Terms = _imported(self.terms)(inputs)
        return terms

    def build_epilogues(self, inputs: "TermInputs") -> Any:
        """Return the fused.Epilogues that the fused pass runs; `fused` names them."""
        assert self.fused is not None
        return _imported(self.fused)(inputs)


_SOFTMAX = "dist_vse.losses.softmax:softmax_terms"
_HARDEST = "dist_vse.losses.hardest:hardest_terms"
_DENSE = "dist_vse.losses.reference:"
_FUSED = "dist_vse.losses.fused:"

LOSSES = {
    spec.name: spec
    for spec in (
        LossSpec(
            name="convse",
            label="ConVSE",
            paper="https://arxiv.org/abs/2110.08872",
            takes_negatives=True,
            dense=_DENSE + "convse",
            terms=_SOFTMAX,
            fused=_FUSED + "softmax_epilogues",
            similarity_unit=lambda scale: scale / LN2,  # terms are in bits
            loss_unit=lambda scale, n: LN2 / n,
            positives_compete=True,
            captions_in_bf16=True,
        ),
        LossSpec(
            name="convse++",
            label="ConVSE++",
            paper="https://arxiv.org/abs/2110.08872",
            takes_negatives=True,
            dense=_DENSE + "convse_plus_plus",
            terms=_HARDEST,
            fused=_FUSED + "hardest_epilogues",
            loss_unit=lambda scale, n: scale / n,
            has_warmup=True,
            cost=LossCost(dense_gradient=False, reduces=(1, 1)),  # the maxima, their indices
        ),
        LossSpec(
            name="info_nce",
            label="InfoNCE",
            paper="https://arxiv.org/abs/2103.00020",  # CLIP: half of ConVSE
            takes_negatives=True,
            dense=_DENSE + "info_nce",
            terms=_SOFTMAX,
            fused=_FUSED + "softmax_epilogues",
            similarity_unit=lambda scale: scale / LN2,
            loss_unit=lambda scale, n: 0.5 * LN2 / n,
            positives_compete=True,
            captions_in_bf16=True,
        ),
        LossSpec(
            name="dcl",
            label="DCL",
            paper="https://arxiv.org/abs/2110.06848",
            takes_negatives=True,
            dense=_DENSE + "dcl",
            terms="dist_vse.losses.decoupled:decoupled_terms",
            fused=_FUSED + "decoupled_epilogues",
            similarity_unit=lambda scale: scale / LN2,
            loss_unit=lambda scale, n: 0.5 * LN2 / n,
            captions_in_bf16=True,
            cost=LossCost(gathers=0, reduces=(1, 1)),  # the maxima, the sums
        ),
        LossSpec(
            name="siglip",
            label="SigLIP",
            paper="https://arxiv.org/abs/2303.15343",
            takes_negatives=True,
            dense=_DENSE + "siglip",
            terms="dist_vse.losses.pairwise:sigmoid_terms",
            fused=_FUSED + "sigmoid_epilogues",
            similarity_unit=lambda scale: scale,
            loss_unit=lambda scale, n: 1 / n,
            positives_compete=True,
            learns_bias=True,
            captions_in_bf16=True,
            cost=LossCost(gathers=0, reduces=()),
        ),
        LossSpec(
            name="vse0",
            label="VSE0",
            paper="https://arxiv.org/abs/1707.05612",
            takes_negatives=True,
            dense=_DENSE + "vse0",
            terms="dist_vse.losses.pairwise:hinge_terms",
            fused=_FUSED + "hinge_epilogues",
            cost=LossCost(reduces=(2,)),  # sums and counts of violations
        ),
        LossSpec(
            name="vse++",
            label="VSE++",
            paper="https://arxiv.org/abs/1707.05612",
            takes_negatives=True,
            dense=_DENSE + "vse_plus_plus",
            terms=_HARDEST,
            fused=_FUSED + "hardest_epilogues",
            has_warmup=True,
            cost=LossCost(dense_gradient=False, reduces=(1, 1)),
        ),
    )
}


_OTHER_NAMES = {
    **dict.fromkeys(("clip", "ntxent", "ntpair", "npair", "contrastive", "infonce"), "info_nce"),
    **dict.fromkeys(("triplet", "hinge", "sumofhinges", "vse"), "vse0"),
    **dict.fromkeys(("vsepp", "maxofhinges", "mh", "hardnegative"), "vse++"),
    **dict.fromkeys(("sigmoid", "sigliploss"), "siglip"),
    "convsepp": "convse++",
    "decoupled": "dcl",
}
"""What the field also calls them, without case and punctuation."""


def check_name(name: str, *, key: str = "loss") -> None:
    """Raise UserError unless the name can be a loss's: one of ours, or "module:NAME".

    A module of the user's is not imported for that. `key` is what the message calls the name.
    """
    if name in LOSSES or ":" in name or name in _entry_points():
        return
    if meant := _OTHER_NAMES.get(re.sub(r"[^a-z+]", "", name.lower())):
        raise UserError(f"{key}={name!r} is unknown; did you mean {meant!r}?")
    raise unknown_name(key, name, [*LOSSES, *_entry_points(), "module:NAME"])


@cache
def find_loss(name: str) -> LossSpec:
    """Return a loss by its name, "module:NAME", or the name of an entry point.

    Raises UserError if there is none, or if what is there is no LossSpec.
    """
    check_name(name)
    if name in LOSSES:
        return LOSSES[name]
    place = name if ":" in name else _entry_points()[name]
    try:
        found = resolve_name(place)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"loss={name!r} can't be imported ({error}); put its module's folder on PYTHONPATH, "
            "or install it"
        ) from None
    if not isinstance(found, LossSpec):
        raise UserError(
            f"loss={name!r} is a {type(found).__name__}, not a LossSpec (dist_vse.losses.registry)"
        )
    return found


def loss_label(name: str) -> str:
    """Return a loss's label; of a loss from outside its name, without importing it."""
    return LOSSES[name].label if name in LOSSES else name


def _imported(function: "str | Callable[..., Any]") -> "Callable[..., Any]":
    found: Callable[..., Any] = resolve_name(function) if isinstance(function, str) else function
    return found


@cache
def _entry_points() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
