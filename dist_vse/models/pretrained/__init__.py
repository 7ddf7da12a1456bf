"""Whole CLIP and SigLIP checkpoints to start from: folders of transformers or of OpenCLIP."""

from pathlib import Path
from typing import Protocol

from dist_vse.common.errors import UserError
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.pretrained import hf, openclip
from dist_vse.models.pretrained.parts import Parts, PooledTrunk, Start
from dist_vse.models.tokenizer import Tokenizer

__all__ = [
    "Parts",
    "PooledTrunk",
    "Start",
    "build_pretrained",
    "pretrained_tokenizer",
    "read_start",
    "save_pretrained",
]


class _Library(Protocol):
    """What the two modules offer."""

    CONFIG: str
    KIND: str

    def read(self, folder: Path) -> Start: ...
    def build(
        self,
        folder: Path,
        *,
        image_size: int | None,
        max_tokens: int | None,
        grad_checkpointing: bool,
    ) -> Parts: ...
    def tokenizer(self, folder: Path, max_tokens: int | None) -> Tokenizer: ...
    def save(self, model: DualEncoder, source: Path, folder: Path) -> None: ...


def read_start(folder: str) -> Start:
    """Return what the checkpoint in a folder decides besides its weights.

    Raises UserError, as do the other functions, if the folder holds no checkpoint that can be
    read.
    """
    return _library(folder).read(Path(folder))


def build_pretrained(
    folder: str,
    *,
    image_size: int | None = None,
    max_tokens: int | None = None,
    grad_checkpointing: bool,
) -> Parts:
    """Build the encoders and heads of the checkpoint in a folder, in float32.

    For another side of images or length of captions than its own, its positions are resampled.
    """
    return _library(folder).build(
        Path(folder),
        image_size=image_size,
        max_tokens=max_tokens,
        grad_checkpointing=grad_checkpointing,
    )


def pretrained_tokenizer(folder: str, max_tokens: int | None = None) -> Tokenizer:
    """Load the checkpoint's tokenizer; it cuts captions to what its text encoder can take.

    Or to `max_tokens`, where the encoder was built for as many.
    """
    return _library(folder).tokenizer(Path(folder), max_tokens)


def save_pretrained(model: DualEncoder, source: str, folder: Path) -> str:
    """Write the trained model in the layout of the checkpoint in `source`; say which it is."""
    library = _library(source)
    folder.mkdir(parents=True)
    library.save(model, Path(source), folder)
    return library.KIND


def _library(folder: str) -> _Library:
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"{folder}: no such folder; model.pretrained is a CLIP or SigLIP checkpoint"
        )
    libraries: tuple[_Library, ...] = (hf, openclip)
    found = [library for library in libraries if (path / library.CONFIG).is_file()]
    if not found:
        raise UserError(
            f"{folder}: neither {hf.CONFIG} (transformers) nor {openclip.CONFIG} (OpenCLIP) is "
            "here; model.pretrained is the folder of a CLIP or SigLIP checkpoint"
        )
    # A folder of both libraries is read by transformers, unless it knows the model as another.
    return openclip if openclip in found and not hf.knows(path) else found[0]
