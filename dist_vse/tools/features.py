"""`dist-vse features`: run a frozen trunk once, over the training images or over all captions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError, writing
from dist_vse.common.files import atomic_write, write_text
from dist_vse.common.log import logger, setup_logging
from dist_vse.config import TrainConfig, load_config
from dist_vse.data.eval_stream import EvalBatch, captions, eval_batches, eval_share
from dist_vse.data.index import Index, read_index
from dist_vse.data.precomputed import Key, holds_features, write_manifest, write_part
from dist_vse.data.samples import Placement
from dist_vse.models.image import ImageTrunk, build_image_trunk
from dist_vse.models.precision import autocast, use_precision
from dist_vse.models.text import build_text_trunk
from dist_vse.models.tokenizer import build_tokenizer
from dist_vse.models.vectors import CAPTIONS, VECTORS
from dist_vse.training.frozen_features import feature_key


@dataclass(frozen=True)
class _NoWords:
    """A tokenizer for those who want the images alone."""

    pad_id: int = 0

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return one padding token a caption."""
        return torch.zeros(len(captions), 1, dtype=torch.int64)


def features_run(config_path: str, overrides: Sequence[str], *, texts: Path | None = None) -> int:
    """Read the command line's config and write the features; return the exit code.

    `texts` is the folder for those of captions, in the place of images'.
    """
    setup_logging()
    with distributed.process_group():
        with distributed.raise_on_all_ranks():
            config = load_config(config_path, overrides)
        if texts is None:
            make_features(config)
        else:
            with distributed.raise_on_all_ranks():
                if distributed.is_main_process():  # captions are short: one process will do
                    write_caption_vectors(config, texts)
    return 0


@torch.no_grad()
def write_caption_vectors(config: TrainConfig, folder: Path, *, batch_size: int = 256) -> None:
    """Write the frozen text trunk's output for each different caption of the data set.

    Raises UserError for a trunk that learns, and for captions of several lines.
    """
    text = config.model.text
    if not (text.all_frozen and text.spec.from_library):
        raise UserError(
            "--texts needs a frozen text encoder: set model.text.kind=pretrained with "
            "model.text.weights and model.text.frozen=true"
        )
    index = read_index(config.data.index, allow_pipe=config.data.allow_pipe)
    unique = [*dict.fromkeys(c for split in index.splits for c in captions(index, split))]
    for caption in unique:
        if "\n" in caption:
            raise UserError(f"{index.root}: the caption {caption!r} has several lines; shard again")
    tokenizer = build_tokenizer(text, list, None)
    trunk = build_text_trunk(text, tokenizer, grad_checkpointing=False).eval()
    here = distributed.device()
    trunk.to(here)
    starts = range(0, len(unique), batch_size)
    batches = (tokenizer(unique[start : start + batch_size]).to(here) for start in starts)
    vectors = torch.cat([trunk(tokens).float().cpu() for tokens in batches])
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / VECTORS) as temporary, temporary.open("wb") as file:
            np.save(file, vectors.numpy())
        write_text(folder / CAPTIONS, "".join(f"{caption}\n" for caption in unique))
    logger.info("wrote the vectors of %d captions into %s", len(unique), folder)


def make_features(config: TrainConfig) -> None:
    """Write the features of `data.train_split` into `data.features`; each rank writes its share.

    Features of the same key that are there already are left alone. Raises UserError if the config
    names no folder, or for a sample that cannot be used.
    """
    with distributed.raise_on_all_ranks():
        if config.data.features is None:
            raise UserError("give data.features=DIR, the folder to write the features into")
        folder = Path(config.data.features)
        index = read_index(config.data.index, allow_pipe=config.data.allow_pipe)
        num_samples = index.split(config.data.train_split).num_samples
        key = feature_key(config, index)
    there = distributed.is_main_process() and holds_features(folder, key, num_samples)
    if distributed.broadcast_object(there):
        logger.info("%s holds these features already", folder)
        return
    _write(config, index, folder, key)
    logger.info("wrote the features of %d images into %s", num_samples, folder)


def _write(config: TrainConfig, index: Index, folder: Path, key: Key) -> None:
    placement = Placement(distributed.rank(), distributed.world_size())
    use_precision(distributed.device(), config.engine.precision)
    split, batch_size = config.data.train_split, config.fixed_chunk_size
    with distributed.raise_on_all_ranks():
        trunk = build_image_trunk(config.model.image, grad_checkpointing=False).eval()
        assert isinstance(trunk, ImageTrunk), "data.features needs model.image.weights"
        folder.mkdir(parents=True, exist_ok=True)
        batches = eval_batches(
            index,
            split,
            _NoWords(),
            config.model.image,
            batch_size=batch_size,
            placement=placement,
            num_workers=config.data.num_workers,
            scaled=True,  # as training decodes them
        )
        start, stop = eval_share(index.split(split).num_samples, batch_size, placement)
        outputs = _outputs(trunk, batches, precision=config.engine.precision)
        part = write_part(folder, distributed.rank(), stop - start, outputs)
    parts = distributed.all_gather_object(part)
    if distributed.is_main_process():
        write_manifest(folder, key, [part for part in parts if part is not None])
    distributed.barrier()


def _outputs(
    trunk: ImageTrunk, batches: Iterable[EvalBatch], *, precision: str
) -> Iterator[Tensor]:
    here = distributed.device()
    trunk.to(here)
    for batch in batches:
        with torch.no_grad(), autocast(here, precision):
            features: Tensor = trunk(batch.images.to(here))
        yield features.float().cpu()
