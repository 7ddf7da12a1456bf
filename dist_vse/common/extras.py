"""What `pip install dist_vse` alone leaves out: one line names the extra that brings it."""

from collections.abc import Iterator
from contextlib import contextmanager

from dist_vse.common.errors import UserError

# The packages of the extra `train` by the names that they are imported by.
TRAIN = frozenset(
    (
        *("accelerate", "braceexpand", "cv2", "deepspeed", "fsspec", "omegaconf", "PIL", "psutil"),
        *("rich", "safetensors", "simplejpeg", "submitit", "tensorboard", "timm", "transformers"),
        *("webdataset", "xxhash", "yaml"),
    )
)


@contextmanager
def needs_train(what: str) -> Iterator[None]:
    """Turn the lack of a package of the extra `train` into a UserError; `what` needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAIN:
            raise
        raise UserError(
            f"{what} needs the package {package}, which is not installed; "
            "pip install 'dist_vse[train]'"
        ) from error
