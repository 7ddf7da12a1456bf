"""What `pip install dist_vse` alone leaves out: one line names the extra that brings it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from dist_vse.common.errors import UserError
from dist_vse.common.terminal import message, say

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


def run_module(name: str, *, home: str | None = None) -> int:
    """Run `main` of a module for `python -m NAME`, or of its `home`; return the exit code.

    That module may import packages of the extra `train` at its top. Where one is missing, rank 0
    says so in one line, and the code is 2.
    """
    try:
        with needs_train(f"python -m {name}"):
            code: int = import_module(home or name).main()
            return code
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            say(f"error: {message(str(error))}", file=sys.stderr)
        return 2
