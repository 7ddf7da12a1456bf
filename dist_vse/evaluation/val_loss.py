"""The validation loss: that of training, over global batches of the evaluation split."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import TrainConfig
from dist_vse.evaluation.evaluate import Embedded
from dist_vse.losses.temperature import bounded
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.training.step_loss import build_loss


class _Ids(NamedTuple):
    image_ids: Tensor
    text_ids: Tensor
    negative_ids: None = None
    teacher: None = None


@torch.no_grad()
def validation_loss(
    model: DualEncoder, split: Embedded, config: TrainConfig, samples_seen: int
) -> float:
    """Return the mean loss over global batches of the split, each image with its first caption.

    Images come in the order of the split, `global_batch_size` at a time; a remainder is left out,
    and a smaller split is one batch. Rank 0 passes all rows, so the number is the same to the bit
    for any number of ranks. Every rank calls this. Raises UserError, on every rank, if it is not
    finite.
    """
    here = distributed.device()
    first = torch.searchsorted(split.image_of_text, torch.arange(len(split.keys)))
    size = min(config.global_batch_size, len(first))
    # A teacher's features are there for training alone.
    alone = replace(config.loss, transport="gather", teacher=None, distill_weight=0.0)
    of_run = replace(config, loss=alone)
    scalars = bounded(model.log_scale.detach()), model.bias.detach()
    losses = []
    for start in range(0, len(first) - size + 1, size):
        rows = torch.arange(start, start + size if distributed.is_main_process() else start)
        texts = first[rows]
        loss = build_loss(of_run, _Ids(split.image_ids[rows], split.text_ids[texts]), samples_seen)
        features = split.image_features[rows].to(here), split.text_features[texts].to(here)
        losses.append(loss(*features, *scalars).loss)
    mean = float(torch.stack(losses).double().mean())
    if not math.isfinite(mean):
        raise UserError(
            f"the validation loss (eval_loss) is {mean}: lower optim.lr, or raise loss.temperature"
        )
    return mean
