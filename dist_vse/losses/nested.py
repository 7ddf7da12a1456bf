"""One model for several widths: the loss of the first features of each embedding as well.

Matryoshka representation learning, Kusupati et al., 2022, https://arxiv.org/abs/2205.13147: the
mean of the losses of the whole features and of their first w numbers, normalised again.

Shape letters: b rows on this rank, c rows of a chunk, d embedding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dist_vse.losses.global_loss import GlobalLoss, LossOutput, compute_together


class NestedLoss:
    """The mean of a loss over the features' whole width and over some smaller ones."""

    def __init__(self, losses: Sequence[GlobalLoss], widths: Sequence[int]) -> None:
        """Take a loss for the whole width, and one for each of `widths`."""
        assert len(losses) == 1 + len(widths), (len(losses), widths)
        self._losses = list(zip(losses, (None, *widths), strict=True))

    @property
    def whole(self) -> GlobalLoss:
        """The loss of the whole width."""
        return self._losses[0][0]

    def prefetch(self, text_features: Tensor) -> None:
        """Start to send a chunk's text features (c, d) to all ranks, at each width."""
        for loss, width in self._losses:
            loss.prefetch(first_features(text_features, width))

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        negatives: Tensor | None = None,
    ) -> LossOutput:
        """Return the loss of features (b, d), and the statistics of the whole width.

        `loss_WIDTH` among these is the loss of a smaller one. Raises UserError as GlobalLoss does.
        """
        features = [
            (
                first_features(image_features, width),
                first_features(text_features, width),
                None if negatives is None else first_features(negatives, width),
            )
            for _, width in self._losses
        ]
        losses = [loss for loss, _ in self._losses]
        outputs = compute_together(losses, features, log_scale, bias)
        of_widths = {
            f"loss_{width}": output.loss.detach()
            for output, (_, width) in zip(outputs, self._losses, strict=True)
            if width is not None
        }
        mean = torch.stack([output.loss for output in outputs]).mean()
        return LossOutput(mean, outputs[0].stats | of_widths)


def first_features(features: Tensor, width: int | None) -> Tensor:
    """Return the first `width` numbers of each feature, of unit length again; None: all of them."""
    return features if width is None else functional.normalize(features[:, :width], dim=1)
