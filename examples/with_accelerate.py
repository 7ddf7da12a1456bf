"""Hugging Face Accelerate, with gradient caching and a gradient scaler's backward."""

import torch
from accelerate import Accelerator

from dist_vse import GlobalContrastiveLoss, cached_step
from examples.pairs import RATE, Towers, rank_batches, save_weights


def main() -> None:
    """Train for a few steps; run it alone, under torchrun or `accelerate launch`."""
    accelerator = Accelerator(cpu=True)
    criterion = GlobalContrastiveLoss("siglip", temperature=0.1).to(accelerator.device)
    model = Towers()
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=RATE)
    model, optimizer = accelerator.prepare(model, optimizer)

    for batch in rank_batches(accelerator.process_index, accelerator.num_processes):
        loss = cached_step(model, criterion, batch, chunk_size=4, backward=accelerator.backward)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"loss {loss.item():.6f}")

    save_weights(model, criterion)
    accelerator.end_training()


if __name__ == "__main__":
    main()
