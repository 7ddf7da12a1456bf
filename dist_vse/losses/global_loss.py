"""The losses over the global batch, exact on any number of ranks.

b rows on this rank, N on all ranks, W ranks, d embedding.

Images stay on their rank; captions are gathered (or passed round), and their gradients come back.
The loss is that of the global batch, the same number on every rank. The gradient that a rank gets
is W times the gradient of that number in the rank's own rows: an engine that averages the
gradients of parameters over the ranks then has exactly the gradient of one process.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.uncompiled import uncompiled
from dist_vse.common.units import GIB
from dist_vse.losses.async_gather import PrefetchedGather
from dist_vse.losses.fused import Epilogues, FusedPass
from dist_vse.losses.kernel_choice import choose_kernels, log_choice
from dist_vse.losses.layout import DuplicatePairs, Layout
from dist_vse.losses.matmul import Matmul
from dist_vse.losses.near_pairs import NearPairs
from dist_vse.losses.negatives import Negatives, WithNegatives
from dist_vse.losses.options import LossOptions
from dist_vse.losses.positives import OwnPairs, Positives
from dist_vse.losses.preflight import (
    Metadata,
    News,
    describe,
    exchange_metadata,
    off_unit,
    refuse,
)
from dist_vse.losses.registry import LossSpec, find_loss
from dist_vse.losses.statistics import summarize
from dist_vse.losses.tiled import Kernels, TermInputs, TiledLoss
from dist_vse.losses.tiles import default_tile
from dist_vse.losses.transport import Gather, Ring, Transport, WithTeacher

_MAY_DIFFER = ("memory_gib", "tile")  # between ranks: they change no number


class LossOutput(NamedTuple):
    """The loss, and statistics of the batch: detached numbers, alike on all ranks."""

    loss: Tensor
    stats: dict[str, Tensor]


class GlobalLoss:
    """The loss of one step over the global batch, of which each rank passes its own rows.

    Text features may be sent ahead, a chunk at a time, with `prefetch`; then the loss is called
    once with all features. 64-bit ids (b,) say which pairs share an image or a caption; they are
    looked at on the host, and should lie there. `negative_ids` (m,) are those of the negatives: one
    that is a row's caption is none for that row. With `unit_length`, features of another length are
    refused. `teacher` features of this rank's images and captions, (b, d') each and of unit length,
    judge which pairs `ignore_above` leaves out, in place of the model's own.
    What the losses are: `dist_vse.losses.reference`, docs/explain/losses.md.
    """

    def __init__(
        self,
        name: str,
        options: LossOptions | None = None,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        unit_length: bool = False,
        negative_ids: Tensor | None = None,
        teacher: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.name = name
        self._teacher = teacher
        self._unit_length = unit_length
        self.options = options or LossOptions()
        given = {"image": image_ids, "text": text_ids}
        self._ids = [x.cpu() for x in given.values() if x is not None]
        self._kinds_of_ids = [kind for kind, ids in given.items() if ids is not None]
        self._text_ids, self._negative_ids = (
            None if x is None else x.cpu() for x in (text_ids, negative_ids)
        )
        self._fault = self.options.fault() or _unknown(name)  # raised on all ranks, when called
        self._captions_in_bf16 = (
            self._fault is None and self.options.bf16_products and find_loss(name).captions_in_bf16
        )
        self._prefetched = PrefetchedGather(self.options.transport, bf16=self._captions_in_bf16)

    def ids(self, rows: int) -> Tensor:
        """Return the ids of this rank's rows (b, k), on the host; k is 0 where there are none."""
        return torch.stack(self._ids, 1) if self._ids else torch.zeros(rows, 0, dtype=torch.long)

    def prefetch(self, text_features: Tensor) -> None:
        """Start to send the text features of a chunk (c, d) to all ranks; chunks come in order.

        Every rank sends equally many rows.
        """
        if self._fault is None:
            self._prefetched.send(text_features)

    @uncompiled
    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        negatives: Tensor | None = None,
    ) -> LossOutput:
        """Return the loss of the global batch, and statistics.

        Features (b, d) of unit length in any floating type, log_scale = log(1/t) and bias (1,);
        b may differ between ranks and be 0, all else must be alike on all ranks. `negatives` (m, d)
        are texts without an image, further captions that no image has; m may differ as well.
        Raises UserError for arguments that do not fit together or that differ between the ranks,
        the same on all of them.
        """
        features = image_features, text_features, negatives
        return compute_together([self], [features], log_scale, bias)[0]

    def _prepare(
        self, features: "Features", log_scale: Tensor, bias: Tensor, kernels: str
    ) -> "_Prepared":
        """Look at this rank's features, for what the other ranks must know of them."""
        image_features, text_features, negatives = features
        spec = find_loss(self.name)
        dtype = _statistics_dtype(features)
        scale = log_scale.to(dtype).exp()
        images, captions = image_features.to(dtype), text_features.to(dtype)  # (b, d)
        unit = torch.ones_like(scale)
        rows = images
        if spec.similarity_unit is not None:
            unit = spec.similarity_unit(scale)
            rows = images * unit
        texts = captions if negatives is None else torch.cat([captions, negatives.to(dtype)])
        inputs = rows, texts, bias.to(dtype)
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        with torch.no_grad():
            own = OwnPairs.of(rows, captions, texts)
            agreed = self._agreed(rows, gradient=keep, kernels=kernels)
            agreed["negatives"] = negatives is not None
            off = off_unit(images, texts) if self._unit_length else None
            num_negatives = len(texts) - len(captions)
            news = describe(own, num_negatives, log_scale, bias, agreed, off_unit=off)
        return _Prepared(images, inputs, own, scale, unit, keep, kernels, news)

    def _finish(self, prepared: "_Prepared", metadata: Metadata) -> LossOutput:
        """Compute the loss, by what the ranks have exchanged."""
        images, inputs, own, scale, unit, keep, kernels, _ = prepared
        captions = inputs[1][: len(images)]
        spec = find_loss(self.name)
        with torch.no_grad():
            tiled = self._build(spec, metadata, inputs, own, unit, fused=kernels == "fused")
            local_total = tiled.forward(keep=keep)
            total, stats = summarize(
                local_total, tiled, images, captions, unit=unit, margin=self.options.margin
            )
        loss = _Total.apply(*inputs, tiled, total.to(scale.dtype))
        loss = (loss * spec.loss_unit(scale, max(1, metadata.layout.total))).view(())
        return LossOutput(loss, stats | {"temperature": 1 / scale.detach().view(())})

    def _choose_kernels(self, features: "Features") -> str:
        """Return what computes the loss, `fused` or `tiled`."""
        images, _, negatives = features
        options = self.options
        only_tiled = options.only_tiled or (
            "there are negatives" if negatives is not None else None
        )
        kernels, reason = choose_kernels(
            options.kernels,
            find_loss(self.name).fused is not None,
            _statistics_dtype(features),
            images.device,
            only_tiled=only_tiled,
        )
        log_choice(options.kernels, kernels, reason)
        return kernels

    def _agreed(self, rows: Tensor, *, gradient: bool, kernels: str) -> dict[str, object]:
        """Return what must be the same on all ranks, by name."""
        options = {k: v for k, v in asdict(self.options).items() if k not in _MAY_DIFFER}
        return {
            "name": self.name,
            **options,
            "kernels": kernels,  # that run, whatever was asked for
            "embedding": rows.shape[1],
            "precision": str(rows.dtype),
            "ids": " and ".join(self._kinds_of_ids) or "none",
            "gradient": gradient,  # whether one is wanted
            "teacher": "none" if self._teacher is None else self._teacher[0].shape[1],
            "prefetched": self._prefetched.rows > 0,
        }

    def _build(
        self,
        spec: LossSpec,
        metadata: Metadata,
        inputs: tuple[Tensor, Tensor, Tensor],
        own: OwnPairs,
        unit: Tensor,
        *,
        fused: bool,
    ) -> TiledLoss:
        rows, texts, bias = (x.detach() for x in inputs)
        captions, of_negatives = texts[: len(rows)], texts[len(rows) :]
        options, layout = self.options, metadata.layout
        negatives = self._negatives(metadata, rows.device)
        matmul = Matmul(rows, bf16=options.bf16_products)
        average = options.duplicates == "positive"
        positives = Positives(
            rows,
            captions,
            own,
            layout,
            self._duplicates(layout, rows),
            average_duplicates=average,
            negatives=negatives,
            near=self._near_pairs(matmul, captions, metadata, unit),
        )
        transport = self._transport(captions, layout, self._prefetched.take())
        positives.include_duplicates(transport)
        if positives.near is not None and positives.near.by_teacher:
            of_teacher = self._transport(positives.near.captions, layout, exact=True)
            transport = WithTeacher(transport, of_teacher)
        if negatives is not None:
            more = self._transport(of_negatives, metadata.negatives)
            transport = WithNegatives(transport, more, layout.total)
        candidates = spec.positives_compete and average
        of_terms = TermInputs(
            positives,
            metadata.largest,
            metadata.smallest_own,
            bias,
            options.margin,
            options.hard_negative_weight,
        )
        kernels: Kernels | None = None
        if fused:
            epilogues: Epilogues = spec.build_epilogues(of_terms)
            terms = epilogues.terms
            kernels = FusedPass(epilogues, matmul, positives, candidates=candidates)
        else:
            terms = spec.build_terms(of_terms)
        return TiledLoss(
            matmul,
            transport,
            positives,
            terms,
            kernels,
            candidates=candidates,
            tile=options.tile or default_tile(rows.device),
            budget=int(options.memory_gib * GIB),
        )

    def _duplicates(self, layout: Layout, rows: Tensor) -> DuplicatePairs | None:
        if not self._ids or self.options.duplicates == "keep":
            return None
        return DuplicatePairs(layout.gather(torch.stack(self._ids, 1)), layout, rows.device)

    def _near_pairs(
        self, matmul: Matmul, captions: Tensor, metadata: Metadata, unit: Tensor
    ) -> NearPairs | None:
        """Return which pairs are no negatives; similarities are cosines times `unit` (1,)."""
        if self.options.ignore_above is None:
            return None
        if self._teacher is not None:
            images, captions = (x.detach().to(captions) for x in self._teacher)
            matmul, unit = Matmul(images, bf16=False), torch.ones_like(unit)
        return NearPairs(
            matmul,
            captions,
            metadata.layout,
            metadata.negatives.total,
            margin=self.options.ignore_above,
            unit=unit,
            by_teacher=self._teacher is not None,
        )

    def _negatives(self, metadata: Metadata, device: torch.device) -> Negatives | None:
        layout, negatives = metadata.layout, metadata.negatives
        if not negatives.total:
            return None
        ids = self._negative_ids
        gathered = None if ids is None else negatives.gather(ids)
        return Negatives(negatives.total, layout.total, device, self._text_ids, gathered)

    def _transport(
        self, texts: Tensor, layout: Layout, gathered: Tensor | None = None, *, exact: bool = False
    ) -> Transport:
        """Return what shows texts to all ranks; `exact` ones are never rounded."""
        travelling = texts.bfloat16() if self._captions_in_bf16 and not exact else texts
        if self.options.transport == "ring" and len(layout.counts) > 1:
            return Ring(travelling, layout)
        return Gather(travelling, layout, gathered)

    def _find_fault(
        self, image_features: Tensor, text_features: Tensor, negatives: Tensor | None
    ) -> str | None:
        """Say what is wrong with this rank's arguments, if anything is."""
        if image_features.ndim != 2 or image_features.shape != text_features.shape:
            return (
                f"image_features {tuple(image_features.shape)} and text_features "
                f"{tuple(text_features.shape)} must have one shape (rows, embedding)"
            )
        if not (image_features.is_floating_point() and text_features.is_floating_point()):
            return (
                f"image_features ({image_features.dtype}) and text_features "
                f"({text_features.dtype}) must be of a floating type"
            )
        rows = len(image_features)
        if any(x.shape != (rows,) or x.dtype != torch.int64 for x in self._ids):
            shapes = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in self._ids)
            return f"ids ({shapes}) must be int64, one a row ({rows} rows)"
        if negatives is not None:
            if not find_loss(self.name).takes_negatives:
                return (
                    f"loss.name={self.name} takes no negatives; choose another, or leave them out"
                )
            if negatives.ndim != 2 or negatives.shape[1] != image_features.shape[1]:
                return f"negatives {tuple(negatives.shape)} must be (number, embedding)"
            ids = self._negative_ids
            if ids is not None and (ids.shape != negatives.shape[:1] or ids.dtype != torch.int64):
                return f"negative_ids {ids.dtype} {tuple(ids.shape)} must be int64, one a negative"
        if self._teacher is not None and (fault := _teacher_fault(self._teacher, rows)):
            return fault
        if self._prefetched.rows not in (0, rows):
            return f"{self._prefetched.rows} rows were prefetched, but the loss is given {rows}"
        return None


Features = tuple[Tensor, Tensor, Tensor | None]
"""Of images and texts (b, d), and of negatives (m, d) if there are any."""


class _Prepared(NamedTuple):
    """A loss's arguments in the dtype of its statistics, and what the other ranks must know."""

    images: Tensor
    inputs: tuple[Tensor, Tensor, Tensor]  # rows, texts, bias
    own: OwnPairs
    scale: Tensor
    unit: Tensor
    keep: bool
    kernels: str
    news: News


def compute_together(
    losses: Sequence[GlobalLoss], features: Sequence[Features], log_scale: Tensor, bias: Tensor
) -> list[LossOutput]:
    """Compute losses of one batch, each of its own features; the host waits once for all of them.

    Raises UserError as GlobalLoss does.
    """
    device = features[0][0].device
    for loss, own in zip(losses, features, strict=True):
        fault = loss._fault or loss._find_fault(*own)
        if fault is not None:
            refuse(fault, device, losses=len(losses))
    scheduled = losses[0].options.temperature
    if scheduled is not None:
        log_scale = torch.full_like(log_scale, -math.log(scheduled))
    with torch.autocast(device.type, enabled=False):
        prepared = [
            loss._prepare(own, log_scale, bias, loss._choose_kernels(own))
            for loss, own in zip(losses, features, strict=True)
        ]
        metadata = exchange_metadata([each.news for each in prepared])
        return [
            loss._finish(own, known)
            for loss, own, known in zip(losses, prepared, metadata, strict=True)
        ]


def _statistics_dtype(features: Features) -> torch.dtype:
    of_both = torch.promote_types(features[0].dtype, features[1].dtype)
    return torch.promote_types(of_both, torch.float32)


# More than eight parameters: a batch's features and ids, each of which may be left out.
@uncompiled
def global_loss(
    name: str,
    image_features: Tensor,
    text_features: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    options: LossOptions | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    negatives: Tensor | None = None,
    negative_ids: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
) -> LossOutput:
    """Return the loss called `name` of the global batch in one call; see `GlobalLoss`."""
    loss = GlobalLoss(
        name,
        options,
        image_ids=image_ids,
        text_ids=text_ids,
        negative_ids=negative_ids,
        teacher=teacher,
    )
    return loss(image_features, text_features, log_scale, bias, negatives)


def _unknown(name: str) -> str | None:
    """Say why there is no such loss, if there is none."""
    try:
        find_loss(name)
    except UserError as error:
        return str(error)
    return None


def _teacher_fault(teacher: tuple[Tensor, Tensor], rows: int) -> str | None:
    """Say why features are no teacher's of so many pairs, if they are none."""
    images, captions = teacher
    if images.ndim == 2 and images.shape == captions.shape and len(images) == rows:
        return None
    shapes = f"{tuple(images.shape)} and {tuple(captions.shape)}"
    return f"the teacher's features {shapes} must have one shape ({rows}, its embedding)"


class _Total(torch.autograd.Function):
    """Gives the total that a tiled pass found the gradient that the same pass will find."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, captions: Tensor, bias: Tensor, tiled: TiledLoss, total: Tensor
    ) -> Tensor:
        ctx.tiled = tiled
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tiled: TiledLoss = ctx.tiled
        if torch.is_grad_enabled():  # alike on all ranks, and before anything is sent
            raise UserError(
                "the loss over the global batch has no second derivative; take its gradient "
                "without create_graph=True"
            )
        with torch.autocast(grad.device.type, enabled=False):
            row_grad, column_grad = tiled.backward()
        factor = grad * distributed.world_size()
        bias_grad = tiled.take_bias_grad()
        bias_grad = None if bias_grad is None else bias_grad * factor
        return row_grad.mul_(factor), column_grad.mul_(factor), bias_grad, None, None
