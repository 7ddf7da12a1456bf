"""The peer: OpenCLIP's WebDataset pipeline, as its training script builds it."""

import inspect
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.tools.verify.peer import peer_version

ENDLESS = 10**8  # samples: the pipeline repeats its shards until an epoch has as many


def require_peer() -> str:
    """Return OpenCLIP's version; raise UserError if its pipeline is missing."""
    version = peer_version()
    if version is None:
        raise UserError("OpenCLIP is not installed; pip install -e '.[dev]'")
    return version


def mend_reader() -> None:
    """Turn off the marks at a shard's end, which OpenCLIP 3.3.0 takes for files, and fails.

    Newer webdatasets set them.
    """
    from open_clip_train import data

    if "eof_value" in inspect.signature(data.tar_file_expander).parameters:
        data.tar_file_expander = partial(data.tar_file_expander, eof_value=None)


# More than eight parameters: OpenCLIP's own function reads as many settings.
def peer_loader(
    tars: Sequence[str],
    *,
    transform: Callable[[Any], Any],
    tokenizer: Callable[[str], Any],
    batch_size: int,
    num_workers: int,
    num_samples: int = ENDLESS,
    resampled: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    buffer: int | None = None,
) -> Any:
    """Return the loader of `open_clip_train.data.get_wds_dataset`, with its `shared_epoch`.

    `buffer` makes its buffer of shuffled samples smaller, so that it is full sooner.
    """
    from open_clip_train import data

    mend_reader()
    if buffer is not None:
        data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = buffer
    args = Namespace(
        train_data="::".join(tars),
        train_num_samples=num_samples,
        train_data_upsampling_factors=None,
        dataset_resampled=resampled,
        seed=seed,
        batch_size=batch_size,
        workers=num_workers,
        world_size=world_size,
    )
    # webdataset looks here for the node, in the workers too
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return data.get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)
