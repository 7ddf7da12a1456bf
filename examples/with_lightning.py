"""Lightning, with gradient caching: `cached_step` in `training_step`, by manual optimization."""

import os
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dist_vse import GlobalContrastiveLoss, cached_step
from examples.pairs import RATE, Towers, rank_batches, save_weights


class Module(lightning.LightningModule):
    """Two towers and their loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # `cached_step` runs the backwards itself
        self.towers = Towers()
        self.criterion = GlobalContrastiveLoss("info_nce")

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return both features; the strategy's DDP calls this for every chunk."""
        features: tuple[Tensor, Tensor] = self.towers(images, texts)
        return features

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Step by the global batch's loss, 4 pairs at a time."""
        wrapped = self.trainer.strategy.model or self  # in DDP, if there are several ranks
        backward = self.manual_backward  # with Lightning's precision and gradient scaler
        loss = cached_step(wrapped, self.criterion, batch, chunk_size=4, backward=backward)
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        if self.global_rank == 0:
            print(f"loss {loss.item():.6f}")

    def configure_optimizers(self) -> Any:
        """Return the optimizer; the criterion's temperature is among the parameters."""
        return torch.optim.SGD(self.parameters(), lr=RATE)


def main() -> None:
    """Train for a few steps; run it alone or under torchrun."""
    rank, world_size = (int(os.environ.get(*x)) for x in (("RANK", "0"), ("WORLD_SIZE", "1")))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # each rank's loader has its own pairs
    )
    module = Module()
    batches: Any = rank_batches(rank, world_size)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    save_weights(module)


if __name__ == "__main__":
    main()
