"""Hugging Face's Trainer, with gradient caching: `training_step` of a few lines."""

import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from dist_vse import GlobalContrastiveLoss, cached_step
from examples.pairs import BATCH, RATE, Towers, make_pairs, save_weights


class TowersWithLoss(nn.Module):
    """The criterion stands in the model, so that the optimizer learns its temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = Towers()
        self.criterion = GlobalContrastiveLoss("convse")

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return both features."""
        features: tuple[Tensor, Tensor] = self.towers(images, texts)
        return features


class GlobalTrainer(Trainer):
    """Minimises the loss of all ranks' pairs, 4 pairs at a time."""

    def training_step(self, model: nn.Module, inputs: Any, *unused: Any) -> Tensor:
        """Put the gradients into `.grad`; the Trainer's optimizer steps after it."""
        model.train()
        return cached_step(
            model,  # as the Trainer wrapped it
            self.model.criterion,
            self._prepare_inputs(inputs),
            chunk_size=4,
            backward=self.accelerator.backward,
        )

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **unused: Any
    ) -> Any:
        """Return the loss of a batch that fits as it is: of the evaluation."""
        features = model(**inputs)
        loss = self.model.criterion(*features)
        return (loss, features) if return_outputs else loss


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The toy pairs; the Trainer deals whole batches out to the ranks in turn."""

    def __init__(self) -> None:
        self.images, self.texts = make_pairs()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"images": self.images[i], "texts": self.texts[i]}


def main() -> None:
    """Train for a few steps; run it alone or under torchrun."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH // world_size,
            num_train_epochs=1,
            learning_rate=RATE,
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
            remove_unused_columns=False,
        )
        model = TowersWithLoss()
        GlobalTrainer(model, arguments, train_dataset=Pairs()).train()
    save_weights(model)


if __name__ == "__main__":
    main()
