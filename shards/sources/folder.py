"""A folder of images with their captions beside them, or in Hugging Face's metadata files.

A caption file has the image's name with `.json` (img2dataset's, with a `caption`) or `.txt`, one
caption a line. `metadata.jsonl` and `metadata.csv` name images by `file_name`, from their own
folder (https://huggingface.co/docs/datasets/image_dataset#imagefolder).
"""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PosixPath
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.files import is_leftover
from dist_vse.common.terminal import short
from dist_vse.data.image_names import is_image_name
from dist_vse.shards.captions import Captions, first_captions, is_missing, read_captions
from dist_vse.shards.json_text import load_json
from dist_vse.shards.notes import note
from dist_vse.shards.record import Record
from dist_vse.shards.sources.paths import existing_folder, open_list, read_text

# As Hugging Face's imagefolder reads them.
SPLITS = {"train": "train", "training": "train"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME, CAPTIONS = "file_name", ("captions", "caption", "text")


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
        yield from _records(path, "", split or "train", columns)
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
    order = list(dict.fromkeys(SPLITS.values()))
    for child, name in sorted(folders.items(), key=lambda pair: order.index(pair[1])):
        if child.name != name:
            note(f"{child}: taken as split {name}")
        empty = True
        for record in _records(child, f"{child.name}/", name, columns):
            empty = False
            yield record
        if empty:
            raise UserError(f"{child}: no images here; add some or remove the folder")


def _is_split(name: str) -> bool:
    return name.lower() in SPLITS


def _records(folder: Path, prefix: str, split: str, columns: tuple[str, ...]) -> Iterator[Record]:
    """Yield the images of a folder, then what its metadata names and is not there."""
    files = _files_under(folder)
    there = set(files)
    listed = _Metadata.read(folder, files, columns)
    for name in _images_among(files):
        stem = os.path.splitext(name)[0]
        captions = listed.captions.pop(name, None)
        if captions is None:
            beside = [f"{stem}{end}" for end in (".json", ".txt") if f"{stem}{end}" in there]
            captions = _captions(folder, beside, columns)
        yield Record(
            image=_join(folder, name),
            captions=captions.texts,
            split=split,
            key=prefix + stem,
            languages=captions.languages,
            fault=captions.fault,
        )
    for name, captions in listed.captions.items():
        key = prefix + os.path.splitext(name)[0]
        fault = captions.fault or ("its file is no image" if name in there else "")
        yield Record(_join(folder, name), captions.texts, split, key, fault=fault)
    for where in listed.unnamed:
        yield Record(where, (), split, where, fault=f"no {FILE_NAME!r}; name the image's file")


def _images_among(files: list[str]) -> Iterator[str]:
    """Yield the images, and what has a caption but an extension that is no image's."""
    stems = {os.path.splitext(name)[0] for name in files if is_image_name(name)}
    texts = {name[:-4] for name in files if name.endswith(".txt")} - stems
    for name in files:
        stem, extension = os.path.splitext(name)
        if is_image_name(name) or (stem in texts and extension not in (".txt", ".json")):
            yield name


def _captions(folder: Path, beside: list[str], columns: tuple[str, ...]) -> Captions:
    """Return the captions of the files beside an image, the first that has any."""
    values: list[Any] = []
    for name in beside:
        path = folder / name
        if not path.is_file():
            continue
        try:
            text = read_text(path)
            if name.endswith(".txt"):
                values.append(text.split("\n"))
                continue
            fields = load_json(text)
            if isinstance(fields, dict):
                values += [fields.get(column) for column in columns]
        except ValueError as error:  # UserError too
            return Captions(fault=f"its caption file {name} is broken ({error})")
    return first_captions(values)


@dataclass
class _Metadata:
    """What a folder's metadata files say."""

    captions: dict[str, Captions] = field(default_factory=dict)  # by path from the folder
    unnamed: list[str] = field(default_factory=list)  # where no file is named

    @classmethod
    def read(cls, folder: Path, files: list[str], columns: tuple[str, ...]) -> "_Metadata":
        found = cls()
        values: dict[str, list[Any]] = {}
        for name in files:
            head, _, base = name.rpartition("/")
            if base not in METADATA:
                continue
            for where, row in _rows(folder / name):
                file = row.get(FILE_NAME)
                if is_missing(file) or not isinstance(file, str):
                    found.unnamed.append(where)
                    continue
                column = next((c for c in columns if not is_missing(row.get(c))), None)
                if column is None:
                    there = ", ".join(map(str, row))
                    fault = f"no caption in {short(where)} (fields: {there}); --caption-column"
                    found.captions[_inside(head, file)] = Captions(fault=f"{fault} chooses one")
                    continue
                values.setdefault(_inside(head, file), []).append(row[column])
        for name, of_image in values.items():
            one = of_image[0] if len(of_image) == 1 else of_image
            found.captions[name] = read_captions(one)
        return found


def _inside(head: str, name: str) -> str:
    return os.path.normpath(os.path.join(head, name))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row of a metadata file stands, and its fields."""
    if path.suffix == ".csv":
        reader = csv.DictReader(read_text(path).split("\n"), strict=True)
        try:
            for cells in reader:
                yield f"{path}:{reader.line_num}", cells
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}; fix the line") from error
        return
    with open_list(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                fields = load_json(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: no JSON ({error}); fix the line") from error
            if not isinstance(fields, dict):
                raise UserError(f"{path}:{number}: must be an object; fix the line")
            yield f"{path}:{number}", fields


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
