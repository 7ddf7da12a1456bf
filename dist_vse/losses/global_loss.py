"""`global_loss`: the losses over the global batch, exact on any number of ranks.

b rows on this rank, N on all ranks, W ranks, d embedding.

Images stay on their rank; captions are gathered (or passed round), and their gradients come back.
The loss is that of the global batch, the same number on every rank. The gradient that a rank gets
is W times the gradient of that number in the rank's own rows: an engine that averages the
gradients of parameters over the ranks then has exactly the gradient of one process.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_vse import distributed
from dist_vse.common.units import GIB
from dist_vse.losses.async_gather import Ahead
from dist_vse.losses.hardest import Hardest
from dist_vse.losses.layout import DuplicatePairs
from dist_vse.losses.pairwise import Hinges, Sigmoid
from dist_vse.losses.positives import OwnPairs, Positives
from dist_vse.losses.preflight import Survey, refuse, take_survey
from dist_vse.losses.registry import HINGES, ON_LOGITS, SOFTMAX, travels_rounded
from dist_vse.losses.softmax import RunningSoftmax, SharedSoftmax, shared_shift
from dist_vse.losses.statistics import summarize
from dist_vse.losses.tiled import Dense, Sparse, Sweep
from dist_vse.losses.tiles import default_tile
from dist_vse.losses.transport import Gather, Ring, Transport


class LossOutput(NamedTuple):
    """The loss, and statistics of the batch: detached numbers, alike on all ranks."""

    loss: Tensor
    stats: dict[str, Tensor]


def global_loss(
    name: str,
    image_features: Tensor,
    text_features: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    margin: float = 0.2,
    hardness: float = 1.0,
    duplicates: str = "mask",
    transport: str = "gather",
    memory_gib: float = 0.25,
    bf16_products: bool = False,
    tile: int | None = None,
    ahead: Ahead | None = None,
) -> LossOutput:
    """Return the loss called `name` of the global batch, of which each rank passes its own rows.

    Features (b, d) of unit length in any floating type, log_scale = log(1/t) and bias (1,),
    64-bit ids (b,); b may differ between ranks and be 0, all else must be alike on all ranks.
    `hardness` goes from 0 (mean of all violations) to 1 (the hardest) for convse++ and vse++.
    `ahead` holds the text features if they were sent a chunk at a time before.
    What the losses are: `dist_vse.losses`, docs/losses.md. Raises UserError for arguments that do
    not fit together or that differ between the ranks, the same on all of them.
    """
    ids = [x for x in (image_ids, text_ids) if x is not None]
    fault = _find_fault(name, image_features, text_features, ids, hardness, duplicates, transport)
    if fault is None and ahead is not None and ahead.rounded:
        fault = _find_rounding(name, bf16_products=bf16_products)
    if fault is not None:
        refuse(fault)
    dtype = torch.promote_types(
        torch.promote_types(image_features.dtype, text_features.dtype), torch.float32
    )
    with torch.autocast(image_features.device.type, enabled=False):
        scale = log_scale.to(dtype).exp()
        rows, columns = image_features.to(dtype), text_features.to(dtype)  # (b, d)
        unit = _unit_of_similarity(name, scale)
        if name in ON_LOGITS:
            rows = rows * unit
        inputs = rows, columns, bias.to(dtype)
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        setting = _Setting(
            name, margin, hardness, duplicates, transport, bf16_products,
            embedding=rows.shape[1], precision=str(dtype), num_ids=len(ids), gradient=keep,
            sent_ahead=ahead is not None,
        )  # fmt: skip
        with torch.no_grad():
            own = OwnPairs.of(rows, columns)
            survey = take_survey(own, log_scale, bias, asdict(setting))
            sweep = _build_sweep(
                setting, survey, *inputs, own, ids, ahead,
                tile=tile or default_tile(rows.device), budget=int(memory_gib * GIB),
            )  # fmt: skip
            local_total = sweep.forward(keep=keep)
            total, stats = summarize(
                local_total,
                sweep,
                image_features.to(dtype),
                columns,
                scale=unit,
                margin=margin,
            )
        loss = _Total.apply(*inputs, sweep, total.to(dtype))
        loss = (loss * _unit_of_loss(name, scale, sweep.positives.layout.total)).view(())
    return LossOutput(loss, stats | {"temperature": 1 / scale.detach().view(())})


@dataclass(frozen=True)
class _Setting:
    """What must be the same on all ranks."""

    name: str
    margin: float
    hardness: float
    duplicates: str
    transport: str
    bf16_products: bool
    embedding: int
    precision: str
    num_ids: int
    gradient: bool  # whether one is wanted
    sent_ahead: bool


class _Total(torch.autograd.Function):
    """Gives the total that a sweep found the gradient that the same sweep will find."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, bias: Tensor, sweep: Sweep, total: Tensor
    ) -> Tensor:
        ctx.sweep = sweep
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sweep: Sweep = ctx.sweep
        with torch.autocast(grad.device.type, enabled=False):
            row_grad, column_grad = sweep.backward()
        factor = grad * distributed.world_size()
        siglip = sweep.dense if isinstance(sweep.dense, Sigmoid) else None
        bias_grad = siglip.take_bias_grad() * factor if siglip is not None else None
        return row_grad.mul_(factor), column_grad.mul_(factor), bias_grad, None, None


def _build_sweep(
    setting: _Setting,
    survey: Survey,
    rows: Tensor,
    columns: Tensor,
    bias: Tensor,
    own: OwnPairs,
    ids: Sequence[Tensor],
    ahead: Ahead | None,
    *,
    tile: int,
    budget: int,
) -> Sweep:
    rows, columns = rows.detach(), columns.detach()
    layout, duplicates_are_positive = survey.layout, setting.duplicates == "positive"
    positives = Positives(
        rows,
        columns,
        own,
        layout,
        DuplicatePairs(layout.gather(torch.stack(list(ids), 1)), layout) if ids else None,
        average_duplicates=duplicates_are_positive,
    )
    rounded = travels_rounded(setting.name, bf16_products=setting.bf16_products)
    travelling = columns.bfloat16() if rounded else columns
    carrier: Transport = (
        Ring(travelling, layout)
        if setting.transport == "ring" and len(layout.counts) > 1
        else Gather(travelling, layout, ahead.take() if ahead is not None else None)
    )
    positives.include_duplicates(carrier)
    dense, sparse = _build_terms(setting, positives, survey, bias)
    return Sweep(
        rows,
        carrier,
        positives,
        dense=dense,
        sparse=sparse,
        duplicates_are_candidates=setting.name in ON_LOGITS and duplicates_are_positive,
        tile=tile,
        budget=budget,
        bf16=setting.bf16_products,
    )


def _build_terms(
    setting: _Setting, positives: Positives, survey: Survey, bias: Tensor
) -> tuple[Dense | None, Sparse | None]:
    margin, hardness = setting.margin, setting.hardness
    if setting.name == "siglip":
        return Sigmoid(positives, bias.detach()), None
    if setting.name == "vse0":
        return Hinges(positives, margin, mean=False, weight=1.0), None
    if setting.name in HINGES:
        return (
            Hinges(positives, margin, mean=True, weight=1 - hardness) if hardness < 1 else None,
            Hardest(positives, margin, weight=hardness, bound=survey.largest)
            if hardness > 0
            else None,
        )
    shift = shared_shift(survey.largest, survey.smallest_own)
    return RunningSoftmax(positives) if shift is None else SharedSoftmax(positives, shift), None


def _unit_of_similarity(name: str, scale: Tensor) -> Tensor:
    """Return what cosines are multiplied with: 1/t, in bits for a softmax; 1 for hinges."""
    if name in SOFTMAX:
        return scale / math.log(2)
    return scale if name in ON_LOGITS else torch.ones_like(scale)


def _unit_of_loss(name: str, scale: Tensor, count: int) -> Tensor | float:
    """Return what the sum over rows and columns is multiplied with."""
    if name in ("vse0", "vse++"):
        return 1.0
    if name == "convse++":
        return scale / max(1, count)
    bits = math.log(2) if name in SOFTMAX else 1.0
    return (0.5 if name == "info_nce" else 1.0) * bits / max(1, count)


def _find_fault(
    name: str,
    image_features: Tensor,
    text_features: Tensor,
    ids: Sequence[Tensor],
    hardness: float,
    duplicates: str,
    transport: str,
) -> str | None:
    """Say what is wrong with arguments, if anything is."""
    for what, value, choices in (
        ("loss", name, (*ON_LOGITS, *HINGES)),
        ("duplicates", duplicates, ("mask", "positive")),
        ("transport", transport, ("gather", "ring")),
    ):
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}"
            return f"{what} {value!r} is unknown; {hint}"
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        return (
            f"image_features {tuple(image_features.shape)} and text_features "
            f"{tuple(text_features.shape)} must have one shape (rows, embedding)"
        )
    if any(x.shape != (len(image_features),) or x.dtype != torch.int64 for x in ids):
        shapes = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in ids)
        return f"ids ({shapes}) must be int64, one a row ({len(image_features)} rows)"
    if not 0 <= hardness <= 1:
        return f"hardness ({hardness}) must be between 0 (all violations) and 1 (hardest)"
    return None


def _find_rounding(name: str, *, bf16_products: bool) -> str | None:
    """Say what is wrong with captions that were rounded before, if the loss needs them whole."""
    if travels_rounded(name, bf16_products=bf16_products):
        return None
    return (
        f"captions were sent ahead in bfloat16, and {name} with bf16_products={bf16_products} "
        "takes them as they are; send them with Ahead(transport)"
    )
