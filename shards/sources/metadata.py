"""Hugging Face's imagefolder: files that name the images of a folder, and their captions.

https://huggingface.co/docs/datasets/image_dataset#imagefolder. `metadata.jsonl`, `.csv` and
`.parquet` name images by `file_name`, from their own folder.
"""

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.terminal import short
from dist_vse.data.sample_fields import OPTIONAL_FIELDS
from dist_vse.shards.captions import Captions, cell_captions, fit_fields, is_missing
from dist_vse.shards.sources.jsonl import json_objects
from dist_vse.shards.sources.paths import read_text
from dist_vse.shards.sources.rows import parquet_rows

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"


@dataclass(frozen=True)
class Described:
    """What is said of an image: its captions, and the optional fields of its JSON."""

    captions: Captions
    extra: dict[str, Any] = field(default_factory=dict)


def optional_fields(fields: dict[str, Any], captions: Captions) -> dict[str, Any]:
    """Return those of the fields that say more about the captions."""
    extra = {name: fields[name] for name in OPTIONAL_FIELDS if not is_missing(fields.get(name))}
    fit_fields(extra, captions)
    return extra


@dataclass
class Metadata:
    """What a folder's metadata files say."""

    images: dict[str, Described] = field(default_factory=dict)  # by path from the folder
    unnamed: dict[str, str] = field(default_factory=dict)  # where no file is named: why not

    @classmethod
    def read(cls, folder: Path, files: Iterable[str], columns: tuple[str, ...]) -> "Metadata":
        """Read the metadata among a folder's files; `columns` may hold the captions.

        Raises UserError, naming the line, for what is no row.
        """
        found = cls()
        rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for name in files:
            head, _, base = name.rpartition("/")
            for where, row in _rows(folder / name) if base in METADATA else ():
                file = row.get(FILE_NAME)
                if is_missing(file) or not isinstance(file, str):
                    there = ", ".join(map(str, row))
                    found.unnamed[where] = f"no {FILE_NAME!r} (fields: {there}); name its file"
                    continue
                rows.setdefault(os.path.normpath(os.path.join(head, file)), []).append((where, row))
        found.images = {name: _described(of_image, columns) for name, of_image in rows.items()}
        return found

    def under(self, folder: str) -> "Metadata":
        """Take out what is said of a sub-folder's images, and all that names no file."""
        prefix = f"{folder}/"
        names = [name for name in self.images if name.startswith(prefix)]
        images = {name.removeprefix(prefix): self.images.pop(name) for name in names}
        unnamed, self.unnamed = self.unnamed, {}
        return Metadata(images, unnamed)


def _described(rows: list[tuple[str, dict[str, Any]]], columns: tuple[str, ...]) -> Described:
    """Join the rows of an image."""
    said: list[Captions] = []
    more: dict[str, Any] = {}
    for where, row in rows:
        column = next((c for c in columns if not is_missing(row.get(c))), None)
        if column is None:
            there = ", ".join(map(str, row))
            fault = f"no caption in {short(where)} (fields: {there}); --caption-column chooses one"
            return Described(Captions(fault=fault))
        said.append(cell_captions(row[column]))
        for name, value in optional_fields(row, said[-1]).items():
            more[name] = [*more.get(name, ()), *(value if isinstance(value, list) else [value])]
    if len(said) == 1:
        return Described(said[0], optional_fields(rows[0][1], said[0]))
    faults = [captions.fault for captions in said if captions.fault]
    texts = tuple(text for captions in said for text in captions.texts)
    return Described(Captions(texts, fault=faults[0] if faults else ""), more)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row of a metadata file stands, and its fields."""
    if path.suffix == ".parquet":
        yield from parquet_rows(path, None)
    elif path.suffix == ".jsonl":
        yield from json_objects(path)
    else:
        reader = csv.DictReader(read_text(path).split("\n"), strict=True)
        try:
            for cells in reader:
                yield f"{path}:{reader.line_num}", cells
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}; fix the line") from error
