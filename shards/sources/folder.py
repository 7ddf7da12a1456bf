"""A folder of images, each with a `.txt` of the same name beside it: one caption a line."""

from collections.abc import Iterator
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.files import is_leftover
from shards.record import Record
from shards.sources.paths import existing_folder, read_lines

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
SPLITS = ("train", "val", "test")


def read_folder(path: Path, *, split: str | None = None) -> Iterator[Record]:
    """Yield every image under `path`, at any depth, in the order of its names.

    Sub-folders train, val and test at the top are the splits; without them all is `split`
    (train by default). Blank lines of a `.txt` are no captions; a text file without an image is
    no sample, an image without a text file is a bad one.

    Raises UserError for images outside the split folders, or `split` beside such folders.
    """
    existing_folder(path)
    folders = [name for name in SPLITS if (path / name).is_dir()]
    if not folders:
        yield from _images(path, path, split or "train")
        return
    if split is not None:
        raise UserError(
            f"{path}: --split {split} conflicts with its folders {', '.join(folders)}; "
            "leave --split out, or give one of the folders as INPUT"
        )
    for child in sorted(path.iterdir()):
        ours = child.name in folders or is_leftover(child.name)
        stray = None if ours else next(_image_paths(child), None)
        if stray is not None:
            raise UserError(
                f"{stray}: lies outside the split folders {', '.join(folders)}; move it into one"
            )
    for name in folders:
        empty = True
        for record in _images(path, path / name, name):
            empty = False
            yield record
        if empty:
            raise UserError(f"{path / name}: no images here; add some or remove the folder")


def _images(root: Path, folder: Path, split: str) -> Iterator[Record]:
    for image in _image_paths(folder):
        text = image.with_suffix(".txt")
        lines = read_lines(text) if text.is_file() else []
        captions = tuple(line.strip() for line in lines if line.strip())
        yield Record(image, captions, split, image.relative_to(root).with_suffix("").as_posix())


def _image_paths(path: Path) -> Iterator[Path]:
    """Yield the images at or under `path`, sorted, but not what the system left there."""
    for candidate in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if is_leftover(candidate.relative_to(path) if path.is_dir() else candidate.name):
            continue
        if candidate.suffix.lower() in SUFFIXES and candidate.is_file():
            yield candidate
