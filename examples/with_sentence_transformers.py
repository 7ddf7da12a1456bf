"""sentence-transformers, with gradient caching: our loss as one of theirs, in their trainer."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from torch import Tensor, nn
from torch.nn import functional

from dist_vse import GlobalContrastiveLoss, cached_step
from examples.pairs import BATCH, RATE, STEPS, save_weights
from tests.support.tiny_models import WORDS, write_tiny_bert


def encode(model: nn.Module, sides: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """Return the unit features of anchors and positives."""
    return [functional.normalize(model(x)["sentence_embedding"], dim=1) for x in sides]


class GlobalLoss(nn.Module):
    """Takes (model, ...) and returns a loss of sentence features, as their losses do."""

    def __init__(self, model: SentenceTransformer, name: str) -> None:
        super().__init__()
        self.model = model
        self.criterion = GlobalContrastiveLoss(name)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        """Return the global batch's loss of (anchor, positive), without gradient caching."""
        loss: Tensor = self.criterion(*encode(self.model, sentence_features))
        return loss


class GlobalTrainer(SentenceTransformerTrainer):
    """Puts the gradients of all ranks' pairs into `.grad`, 4 pairs at a time."""

    def training_step(self, model: nn.Module, inputs: Any, *unused: Any) -> Tensor:
        """Return the loss; the trainer's optimizer steps after it."""
        model.train()
        sides, _ = self.collect_features(self._prepare_inputs(inputs))
        backward, criterion = self.accelerator.backward, self.loss.criterion
        return cached_step(model, criterion, sides, chunk_size=4, forward=encode, backward=backward)


def sentences(seed: int) -> list[str]:
    """Draw a sentence a pair."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, len(WORDS), (STEPS * BATCH, 5), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in words.tolist()]


def main() -> None:
    """Train for a few steps; run it alone or under torchrun."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as folder:
        bert = write_tiny_bert(Path(folder) / "bert")
        model = SentenceTransformer(str(bert), device="cpu")  # with mean pooling
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("pooler" not in name)  # which mean pooling does not use
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # one process cannot draw what two drew
        pairs = {"anchor": sentences(1), "positive": sentences(2)}
        arguments = Arguments(
            folder,
            per_device_train_batch_size=BATCH // world_size,
            num_train_epochs=1,
            learning_rate=RATE / 10,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
        )
        loss = GlobalLoss(model, "info_nce")
        GlobalTrainer(model, arguments, train_dataset=Dataset.from_dict(pairs), loss=loss).train()
    save_weights(model, loss.criterion)


if __name__ == "__main__":
    main()
