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
from typing import NamedTuple

import torch
from torch import Tensor

from dist_vse.common.uncompiled import uncompiled
from dist_vse.common.units import GIB
from dist_vse.losses.argument_faults import Features, fault_of_features, fault_of_name
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
    ArgumentSummary,
    Metadata,
    exchange_metadata,
    off_unit,
    refuse,
    summarize_arguments,
)
from dist_vse.losses.registry import LossSpec, find_loss
from dist_vse.losses.statistics import summarize
from dist_vse.losses.tiled import Kernels, TermInputs, TiledLoss
from dist_vse.losses.tiles import default_tile
from dist_vse.losses.total import TotalOverRanks
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
        # Raised on all ranks, when called.
        self._fault = self.options.fault() or fault_of_name(name)
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

    def _find_fault(self, features: Features) -> str | None:
        """Say what is wrong with this rank's arguments, if anything is."""
        return self._fault or fault_of_features(
            self.name,
            features,
            ids=self._ids,
            negative_ids=self._negative_ids,
            teacher=self._teacher,
            prefetched=self._prefetched.rows,
        )

    def _prepare(
        self, features: Features, log_scale: Tensor, bias: Tensor, kernels: str
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
            summary = summarize_arguments(own, num_negatives, log_scale, bias, agreed, off_unit=off)
        return _Prepared(images, inputs, own, scale, unit, keep, kernels, summary)

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

        def gradients() -> tuple[Tensor | None, ...]:
            return *tiled.backward(), tiled.take_bias_grad()

        loss = TotalOverRanks.apply(gradients, total.to(scale.dtype), *inputs)
        loss = (loss * spec.loss_unit(scale, max(1, metadata.layout.total))).view(())
        return LossOutput(loss, stats | {"temperature": 1 / scale.detach().view(())})

    def _choose_kernels(self, features: Features) -> str:
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


class _Prepared(NamedTuple):
    """A loss's arguments in the dtype of its statistics, and what the other ranks must know."""

    images: Tensor
    inputs: tuple[Tensor, Tensor, Tensor]  # rows, texts, bias
    own: OwnPairs
    scale: Tensor
    unit: Tensor
    keep: bool
    kernels: str
    summary: ArgumentSummary


@uncompiled
def compute_together(
    losses: Sequence[GlobalLoss], features: Sequence[Features], log_scale: Tensor, bias: Tensor
) -> list[LossOutput]:
    """Compute losses of one batch, each of its own features; the host waits once for all of them.

    Raises UserError as GlobalLoss does.
    """
    device = features[0][0].device
    for loss, own in zip(losses, features, strict=True):
        fault = loss._find_fault(own)
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
        metadata = exchange_metadata([each.summary for each in prepared])
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
