"""A folder of images with their captions beside them, or in Hugging Face's metadata files.

A caption file has the image's name with `.json` (img2dataset's, with a `caption`), or with `.txt`
or `.caption`, one caption a line.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PosixPath
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.files import is_leftover
from dist_vse.data.image_names import is_image_name
from dist_vse.shards.captions import Captions, first_captions
from dist_vse.shards.json_text import load_json
from dist_vse.shards.notes import note
from dist_vse.shards.record import Record
from dist_vse.shards.sources.metadata import METADATA, Described, Metadata, optional_fields
from dist_vse.shards.sources.paths import SPLITS, existing_folder, read_text

CAPTIONS = ("captions", "caption", "text")
CAPTION_FILES = (".json", ".txt", ".caption")  # the first that has one counts


def read_folder(
    path: Path, *, split: str | None = None, caption_column: str | None = None
) -> Iterator[Record]:
    """Yield every image under `path`, at any depth, in the order of its names.

    Links to folders are followed. Sub-folders train, val and test at the top (or as `SPLITS` calls
    them) are the splits; without them all is `split` (train by default). Blank lines of a `.txt`
    are no captions; a text file without an image is no sample, an image without a caption, or a
    link that leads nowhere, is a bad one. `caption_column` names the field of a JSON or metadata
    file that holds the captions.

    Raises UserError for images outside the split folders, or `split` beside such folders.
    """
    existing_folder(path)
    columns = (caption_column,) if caption_column else CAPTIONS
    children = sorted(child for child in path.iterdir() if not is_leftover(child.name))
    folders = {c: SPLITS[c.name.lower()] for c in children if c.is_dir() and _is_split(c.name)}
    if not folders:
        yield from _records(path, "", split or "train", columns, Metadata())
        return
    names = ", ".join(child.name for child in folders)
    if split is not None:
        raise UserError(
            f"{path}: --split {split} conflicts with its folders {names}; "
            "leave --split out, or give one of the folders as INPUT"
        )
    for child in children:
        strays = [child.name]
        if child.is_dir():
            strays = [] if child in folders else [f"{child.name}/{n}" for n in _files_under(child)]
        for stray in filter(is_image_name, strays):
            raise UserError(
                f"{path / stray}: lies outside the split folders {names}; move it into one"
            )
    metadata = [child.name for child in children if child.name in METADATA]
    above = Metadata.read(path, metadata, columns)
    order = list(dict.fromkeys(SPLITS.values()))
    for child, name in sorted(folders.items(), key=lambda pair: order.index(pair[1])):
        if child.name != name:
            note(f"{child}: taken as split {name}")
        empty = True
        of_child = above.under(child.name)
        for record in _records(child, f"{child.name}/", name, columns, of_child):
            empty = False
            yield record
        if empty:
            raise UserError(f"{child}: no images here; add some or remove the folder")
    for stray in above.images:
        raise UserError(
            f"{path}: its {' and '.join(metadata)} names {stray!r}, which lies outside the split "
            f"folders {names}; move it into one"
        )


def _is_split(name: str) -> bool:
    return name.lower() in SPLITS


def _records(
    folder: Path, prefix: str, split: str, columns: tuple[str, ...], above: Metadata
) -> Iterator[Record]:
    """Yield the images of a folder, then what its metadata names and is not there.

    `above` is what metadata of the folder above says of its images.
    """
    files = _files_under(folder)
    there = set(files)
    texts = _caption_files(files)
    listed = Metadata.read(folder, files, columns)
    images = {**above.images, **listed.images}
    for name in _images_among(files):
        stem = os.path.splitext(name)[0]
        said = images.pop(name, None)
        if said is None:
            said = _beside(folder, texts.get(stem) or texts.get(name) or [], columns)
        if not said.captions.texts and not said.captions.fault:
            said = Described(Captions(fault=f"no caption; put it into {Path(stem).name}.txt"))
        yield Record(
            image=_join(folder, name),
            captions=said.captions.texts,
            split=split,
            key=prefix + stem,
            extra=said.extra,
            languages=said.captions.languages,
            fault=said.captions.fault,
        )
    for name, said in images.items():
        fault = said.captions.fault or ("its file is no image" if name in there else "")
        key = prefix + os.path.splitext(name)[0]
        yield Record(_join(folder, name), said.captions.texts, split, key, fault=fault)
    for where, fault in (above.unnamed | listed.unnamed).items():
        yield Record(where, (), split, os.path.basename(where), fault=fault)


def _caption_files(files: list[str]) -> dict[str, list[str]]:
    """Return the caption files by the name that they share with an image, `.json` first."""
    found: dict[str, list[str]] = {}
    for extension in CAPTION_FILES:
        for name in files:
            stem, own = os.path.splitext(name)
            if own.lower() == extension:
                found.setdefault(stem, []).append(name)
    return found


def _images_among(files: list[str]) -> Iterator[str]:
    """Yield the images, and what has a caption but an extension that is no image's."""
    stems = {os.path.splitext(name)[0] for name in files if is_image_name(name)}
    parts = [os.path.splitext(name) for name in files]
    texts = {stem for stem, end in parts if end.lower() in CAPTION_FILES[1:]} - stems
    for name, (stem, end) in zip(files, parts, strict=True):
        if is_image_name(name) or (stem in texts and end.lower() not in CAPTION_FILES):
            yield name


def _beside(folder: Path, beside: list[str], columns: tuple[str, ...]) -> Described:
    """Return what the files beside an image say: the captions of the first that has any."""
    values: list[Any] = []
    fields: Any = {}
    for name in beside:
        path = folder / name
        if not path.is_file():
            continue
        try:
            text = read_text(path)
            if not name.lower().endswith(".json"):
                values.append(text.split("\n"))
                continue
            fields = load_json(text)
            if isinstance(fields, dict):
                values += [fields.get(column) for column in columns]
        except ValueError as error:  # UserError too
            return Described(Captions(fault=f"its caption file {name} is broken ({error})"))
    captions = first_captions(values)
    if beside and not captions.texts and not captions.fault:
        hint = "; --caption-column chooses a field" if isinstance(fields, dict) and fields else ""
        return Described(Captions(fault=f"no caption in {', '.join(beside)}{hint}"))
    return Described(
        captions, optional_fields(fields, captions) if isinstance(fields, dict) else {}
    )


def _files_under(folder: Path) -> list[str]:
    """Return the paths, from the folder, of all files under it, in the order of their names.

    Links to folders are followed, unless they lead back up. What the system left is left out.
    Raises UserError for a folder that can't be read.
    """
    if not isinstance(folder, PosixPath):  # fsspec's
        paths = [p for p in folder.rglob("*") if p.is_file()]
        names = [str(p.relative_to(folder)) for p in paths]
        return sorted((n for n in names if not is_leftover(n)), key=lambda n: n.split("/"))
    found: list[str] = []
    _collect(str(folder), "", frozenset(), found)
    return sorted(found, key=lambda name: name.split("/"))


def _collect(folder: str, prefix: str, above: frozenset[tuple[int, int]], found: list[str]) -> None:
    try:
        status = os.stat(folder)
        here = status.st_dev, status.st_ino
        if here in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_leftover(entry.name):
                    continue
                if entry.is_dir():
                    _collect(entry.path, f"{prefix}{entry.name}/", above | {here}, found)
                else:
                    found.append(prefix + entry.name)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be read ({error.strerror}); fix that and run the "
            "command again"
        ) from error


def _join(folder: Path, name: str) -> str | Path:
    return os.path.join(folder, name) if isinstance(folder, PosixPath) else folder / name
