"""A folder of images with one folder a class: its files, and what its classes are called."""

from dataclasses import dataclass
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.files import is_leftover
from dist_vse.common.reading import BadFileError, read_text
from dist_vse.data.image_names import is_image_name
from dist_vse.models.class_names import CLIP, IMAGENET, clip_templates, imagenet_names

TEMPLATE = "a photo of a {}."
"""What CLIP's users expect where they give no templates."""


@dataclass(frozen=True)
class ClassFolder:
    """Images by their class."""

    files: list[list[Path]]
    """Those of each class, in the order of the folders' names."""
    names: list[str]
    """Of the classes, in words."""
    templates: list[str]
    """Texts with a `{}` for the name."""

    @property
    def texts(self) -> list[str]:
        """Every name in every template, class by class."""
        return [t.replace("{}", name) for name in self.names for t in self.templates]


def read_class_folder(
    data: Path, classes: str | Path | None, templates: str | Path | None
) -> ClassFolder:
    """Read the folder; `classes` and `templates` are files, or `imagenet` and `clip`.

    `classes` has a line `FOLDER<TAB>NAME` each; without it the folders' names are the words.
    `templates` has lines with a `{}`; without it `TEMPLATE` alone.
    Raises UserError for a folder without images, fewer than two classes, and a class without a
    name.
    """
    found = _read_folder(data)
    if len(found) < 2:
        raise UserError(f"{data}: holds one class, which every image is of; give two or more")
    names = _read_names(classes, list(found))
    return ClassFolder([*found.values()], [*names.values()], _read_templates(templates))


def _read_folder(data: Path) -> dict[str, list[Path]]:
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; give a folder with one folder of images a class")
    found = {
        folder.name: sorted(
            f
            for f in folder.rglob("*")
            if is_image_name(f.name) and not is_leftover(f.relative_to(folder))
        )
        for folder in sorted(data.iterdir())
        if folder.is_dir() and not is_leftover(folder.name)
    }
    empty = [name for name, files in found.items() if not files]
    if not found or empty:
        where = f"{data / empty[0]}" if empty else f"{data}"
        raise UserError(f"{where}: no image here; give a folder with one folder of images a class")
    return found


def _read_names(path: str | Path | None, folders: list[str]) -> dict[str, str]:
    """Return each folder's name in words, in the order of the folders."""
    if path is None:
        return {folder: folder.replace("_", " ").replace("-", " ") for folder in folders}
    if path == IMAGENET:
        return imagenet_names(folders)
    pairs = [line.split("\t", 1) for line in _lines(Path(path))]
    broken = [number for number, pair in enumerate(pairs, 1) if len(pair) != 2]
    if broken:
        raise UserError(f"{path}: line {broken[0]} is not FOLDER<TAB>NAME; mend it")
    names = {folder.strip(): name.strip() for folder, name in pairs}
    missing = [folder for folder in folders if not names.get(folder)]
    if missing:
        raise UserError(f"{path}: names no class for the folder {missing[0]!r}; add a line")
    return {folder: names[folder] for folder in folders}


def _read_templates(path: str | Path | None) -> list[str]:
    if path is None:
        return [TEMPLATE]
    if path == CLIP:
        return clip_templates()
    lines = _lines(Path(path))
    bare = [line for line in lines if "{}" not in line]
    if bare or not lines:
        what = repr(bare[0]) if bare else "the file"
        raise UserError(
            f"{path}: {what} has no {{}} for the class; write lines like a photo of a {{}}"
        )
    return lines


def _lines(path: Path) -> list[str]:
    try:
        text = read_text(path)
    except BadFileError as error:
        raise UserError(f"{path}: can't be read ({error})") from error
    return [line for line in text.splitlines() if line.strip()]
