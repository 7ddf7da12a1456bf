"""Distillation: a teacher's similarities over the global batch, matched by the model's own.

For every image, the teacher's similarities with all captions make a distribution (a softmax), and
so do the model's; for every caption over all images too. The term is the mean Kullback-Leibler
divergence of the model's from the teacher's: CLIP-KD's contrastive relational distillation
(https://arxiv.org/abs/2307.12732) and MobileCLIP's (https://arxiv.org/abs/2311.17049), over the
global batch and with stored features of the teacher.

b rows (images) on this rank, N columns (captions) on all ranks, d and d' embedding of the model and
of the teacher. z are the model's logits, y the teacher's.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.uncompiled import uncompiled
from dist_vse.losses.global_loss import GlobalLoss, LossOutput
from dist_vse.losses.layout import Layout
from dist_vse.losses.log_sum_exp import LOW
from dist_vse.losses.matmul import Matmul
from dist_vse.losses.nested import NestedLoss
from dist_vse.losses.options import LossOptions
from dist_vse.losses.tiles import default_tile, ranges, tile_shape
from dist_vse.losses.total import TotalOverRanks
from dist_vse.losses.transport import Block, Gather, Ring, Transport, WithTeacher


class Teacher(NamedTuple):
    """What another model made of this rank's pairs, and how it counts."""

    images: Tensor  # (b, d'), of unit length
    captions: Tensor  # (b, d')
    temperature: float
    weight: float


class DistilledLoss:
    """A loss, plus a weight times the divergence from the teacher."""

    def __init__(
        self, loss: GlobalLoss | NestedLoss, teacher: Teacher, options: LossOptions
    ) -> None:
        """Take the temperature, transport and tiles of the model's side from `options`."""
        self.loss, self.teacher, self.options = loss, teacher, options

    @property
    def whole(self) -> GlobalLoss:
        """The loss of the features' whole width, without the term."""
        return self.loss.whole if isinstance(self.loss, NestedLoss) else self.loss

    def prefetch(self, text_features: Tensor) -> None:
        """Send a chunk's text features (c, d) ahead for the loss; the term sends its own."""
        self.loss.prefetch(text_features)

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        negatives: Tensor | None = None,
    ) -> LossOutput:
        """Return the sum; `distillation` among the statistics is the divergence, in nats."""
        output = self.loss(image_features, text_features, log_scale, bias, negatives)
        term = divergence(image_features, text_features, log_scale, self.teacher, self.options)
        loss = output.loss + self.teacher.weight * term
        return LossOutput(loss, output.stats | {"distillation": term.detach()})


@uncompiled
def divergence(
    images: Tensor, captions: Tensor, log_scale: Tensor, teacher: Teacher, options: LossOptions
) -> Tensor:
    """Return the mean of both directions' divergences over the global batch, in nats.

    Features (b, d) of unit length and log_scale (1,) are the model's; the gradient follows the
    convention of `GlobalLoss`. Every rank calls this, with as many rows as it likes.
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    if options.temperature is not None:
        log_scale = torch.full_like(log_scale, -math.log(options.temperature))
    with torch.autocast(images.device.type, enabled=False):
        rows = images.to(dtype) * log_scale.to(dtype).exp()
        of_teacher = teacher.images.to(rows) / teacher.temperature, teacher.captions.to(rows)
        columns = captions.to(dtype)
        with torch.no_grad():
            run = _Pass(rows.detach(), columns.detach(), of_teacher, options)
            total = run.forward()
        summed: Tensor = TotalOverRanks.apply(run.backward, total.to(dtype), rows, columns)
        return summed / (2 * max(1, run.layout.total))


class _Sides:
    """Running softmaxes of both models along rows, or along columns, of (n,) each."""

    def __init__(self, count: int, like: Tensor) -> None:
        self.maxima = like.new_full((2, count), LOW)  # of z and of y
        self.sums = like.new_zeros(2, count)
        self.gaps = like.new_zeros(count)  # sum of e^(y - maximum) (y - z)

    def accumulate(self, z: Tensor, y: Tensor, dim: int, where: slice) -> None:
        """Take a tile's logits in, along its dimension."""
        maxima, sums = self.maxima[:, where], self.sums[:, where]
        raised = torch.maximum(maxima, torch.stack([z.amax(dim), y.amax(dim)]))
        old = (maxima - raised).exp()
        powers = (y - raised[1].unsqueeze(dim)).exp()
        sums[0] = sums[0] * old[0] + (z - raised[0].unsqueeze(dim)).exp().sum(dim)
        sums[1] = sums[1] * old[1] + powers.sum(dim)
        self.gaps[where] = self.gaps[where] * old[1] + (powers * (y - z)).sum(dim)
        maxima.copy_(raised)

    def join(self) -> None:
        """Join what the ranks have of the columns."""
        largest = distributed.all_reduce_max(self.maxima.clone())
        old = (self.maxima - largest).exp()
        joined = distributed.all_reduce_sum(
            torch.cat([self.sums * old, (self.gaps * old[1])[None]])
        )
        self.maxima, self.sums, self.gaps = largest, joined[:2], joined[2]

    def finalize(self) -> Tensor:
        """Return the divergences (n,); keep the logarithms of the softmaxes' sums."""
        self.logs = self.maxima + self.sums.log()  # (2, n)
        return self.gaps / self.sums[1] + self.logs[0] - self.logs[1]


class _Pass:
    """The tiles of this rank's rows with the global batch's columns, forward and backward."""

    def __init__(
        self, rows: Tensor, columns: Tensor, teacher: tuple[Tensor, Tensor], options: LossOptions
    ) -> None:
        count = torch.tensor([len(rows)])  # on the host: no GPU is waited for
        counts = distributed.gather_rows(count).tolist()
        self.layout = Layout(tuple(counts), distributed.rank())
        self.matmul, self.of_teacher = (Matmul(x, bf16=False) for x in (rows, teacher[0]))
        ring = options.transport == "ring" and len(counts) > 1
        shown: list[Transport] = [
            Ring(x, self.layout) if ring else Gather(x, self.layout) for x in (columns, teacher[1])
        ]
        self.transport = WithTeacher(*shown)
        self.tile = tile_shape(options.tile or default_tile(rows.device), dense=True)
        self.rows, self.columns = (_Sides(n, rows) for n in (len(rows), self.layout.total))

    def forward(self) -> Tensor:
        """Return the sum of all ranks' divergences."""
        for block in self.transport.blocks():
            for rows, columns in self._tiles(block):
                z, y = self._logits(block, rows, columns)
                self.rows.accumulate(z, y, 1, rows)
                self.columns.accumulate(z, y, 0, columns)
        self.columns.join()
        total = self.rows.finalize().sum() + self.columns.finalize()[self.layout.own].sum()
        return distributed.all_reduce_sum(total.double())

    def backward(self) -> tuple[Tensor, Tensor]:
        """Return the gradient of that sum in this rank's rows and captions (b, d)."""
        row_grad = torch.zeros_like(self.matmul.features)

        def contribute(block: Block) -> Tensor:
            sums = self.matmul.gradient_sums(block.features.contiguous(), strip=self.tile[1])
            for rows, columns in self._tiles(block):
                z, y = self._logits(block, rows, columns)
                of_rows, of_columns = self.rows.logs[:, rows, None], self.columns.logs[:, columns]
                grad = (z - of_rows[0]).exp_().add_((z - of_columns[0]).exp_())
                grad.sub_((y - of_rows[1]).exp_()).sub_((y - of_columns[1]).exp_())
                sums.add(rows, block.within(columns), grad)
            of_rows_here, of_columns_here = sums.finish()
            row_grad.add_(of_rows_here)
            return of_columns_here

        return row_grad, self.transport.collect(contribute)

    def _logits(self, block: Block, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the tile's z and y (rows, columns)."""
        assert block.teacher is not None
        where = block.within(columns)
        return (
            self.matmul.similarities(rows, block.features[where]),
            self.of_teacher.similarities(rows, block.teacher[where]),
        )

    def _tiles(self, block: Block) -> Iterator[tuple[slice, slice]]:
        height, width = self.tile
        for rows in ranges(0, len(self.matmul.features), height):
            for columns in ranges(block.columns.start, block.columns.stop, width):
                yield rows, columns
