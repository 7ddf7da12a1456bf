"""Which cached outputs of a frozen image trunk a run may read."""

from importlib import metadata
from pathlib import Path

from dist_vse import distributed
from dist_vse.common.files import sha256_of_file
from dist_vse.config import TrainConfig
from dist_vse.data.index import Index
from dist_vse.data.precomputed import Features, Key, open_features


def feature_key(config: TrainConfig, index: Index) -> Key:
    """Return all that the outputs of the frozen image trunk depend on."""
    image, here = config.model.image, distributed.device().type
    return {
        "model": f"{image.kind} {image.name}",
        "weights": sha256_of_file(Path(str(image.weights)))[:16],
        "size": f"{image.size}{' squashed' * image.squash} {image.resampling}{_crop(config)}",
        "data": f"{index.fingerprint()} {config.data.train_split}",
        "precision": f"{config.engine.precision} {here}",
        "timm": metadata.version("timm"),
    }


def _crop(config: TrainConfig) -> str:
    share = config.model.image.crop_share
    return "" if share == 1 else f" {share} of the side"


def open_run_features(config: TrainConfig, index: Index) -> Features | None:
    """Open the cached outputs of the image trunk; None where images are read.

    Raises UserError if they are missing, cut, or stale.
    """
    if config.data.features is None:
        return None
    num_samples = index.split(config.data.train_split).num_samples
    return open_features(Path(config.data.features), feature_key(config, index), num_samples)
