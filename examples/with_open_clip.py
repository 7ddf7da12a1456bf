"""OpenCLIP's model, tokenizer and data loader, with our loss and gradient caching under DDP."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from open_clip import SimpleTokenizer, image_transform
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip_train.data import CsvDataset
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dist_vse import GlobalContrastiveLoss, cached_step
from examples.pairs import BATCH, STEPS, save_weights

SIZE, LENGTH = 32, 12


def build_model() -> CLIP:
    """Build a small CLIP with random weights; its `logit_scale` is learned, as ever."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=SIZE)
    text = CLIPTextCfg(context_length=LENGTH, width=32, heads=2, layers=1)
    return CLIP(32, vision, text, output_dict=True)


def write_pairs(folder: Path) -> Path:
    """Write pictures and a table of their captions, as OpenCLIP reads them."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    lines = ["filepath\ttitle"]
    for i in range(STEPS * BATCH):
        pixels = numbers.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{folder / f'{i}.png'}\tnumber {i} of {i % 7} kinds")
    (folder / "pairs.tsv").write_text("\n".join(lines))
    return folder / "pairs.tsv"


def load_pairs(table: Path, rank: int, world_size: int) -> DataLoader[Any]:
    """Return OpenCLIP's data; every rank reads its rows of each step's batch."""
    data = CsvDataset(
        table,
        image_transform(SIZE, is_train=False),
        img_key="filepath",
        caption_key="title",
        tokenizer=SimpleTokenizer(context_length=LENGTH),
    )
    rows = BATCH // world_size
    order = [step * BATCH + rank * rows + i for step in range(STEPS) for i in range(rows)]
    return DataLoader(data, batch_size=rows, sampler=order)


def main() -> None:
    """Train for a few steps; run it alone or under torchrun."""
    model: torch.nn.Module = build_model()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    criterion = GlobalContrastiveLoss("info_nce", learned=False)  # the model has its own
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    with tempfile.TemporaryDirectory() as folder:
        for images, texts in load_pairs(write_pairs(Path(folder) / "data"), rank, world_size):
            loss = cached_step(model, criterion, (images, texts), chunk_size=4)
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0:
                print(f"loss {loss.item():.6f}")

    save_weights(model)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
