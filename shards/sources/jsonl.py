"""JSON lines: one image a line, with its caption or captions."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.terminal import short
from dist_vse.shards.captions import (
    first_captions,
    fit_fields,
    is_missing,
    joined_captions,
    named_columns,
    named_languages,
)
from dist_vse.shards.json_text import load_json
from dist_vse.shards.record import Image, Record
from dist_vse.shards.sources.paths import existing_folder, image_fault, image_in, open_list
from dist_vse.shards.sources.stored_images import StoredImages, base64_image


def read_jsonl(
    path: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    scratch: Path | None = None,
) -> Iterator[Record]:
    """Yield a record for each line `{"image": path, "captions": [...], "split"?, "key"?}`.

    `"caption": "..."` stands for one caption, `"captions": {"en": [...], "de": "..."}` for those of
    several languages; `caption_column` names another field, or several as in `read_table`. Paths
    start from `images`, or from the file's folder; an image in base64 is copied into `scratch`. A
    line without a split is of `split` (train by default). Other fields go into the sample's JSON. A
    line whose values can't be used is a bad sample. The file may also be one JSON list of such
    objects.

    Raises UserError, naming the line, for what is no JSON object.
    """
    root = existing_folder(images) if images else path.parent
    stored = StoredImages(scratch)
    columns = named_columns(caption_column) if caption_column else {}
    reading = _Reading(root, split or "train", image_column, columns, stored)
    for where, fields in json_objects(path):
        yield reading.record(fields, where)
    stored.close()


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each object stands, and the object: one a line, or those of one JSON list.

    Raises UserError for what is none.
    """
    with open_list(path) as lines:
        name = str(path)
        for number, line in enumerate(lines, 1):
            if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                entries = _parsed(line + lines.read(), name)
                for place, entry in enumerate(entries, 1):
                    yield _object(entry, f"{name}: entry {place}")
                return
            if line.strip():
                where = f"{name}:{number}"
                yield _object(_parsed(line, where), where)


def _parsed(text: bytes, where: str) -> Any:
    try:
        return load_json(text)
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(
            f"{where}: no JSON ({error}); write one object a line, or one JSON list of them"
        ) from error


def _object(content: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(content, dict):
        raise UserError(
            f'{where}: must be an object such as {{"image": "a.jpg", "caption": "..."}}'
        )
    return where, content


@dataclass(frozen=True)
class _Reading:
    """How lines become records."""

    root: Path
    split: str
    image_column: str
    captions: dict[str, str]  # fields that hold some, each with its language; empty: the usual ones
    stored: StoredImages

    def record(self, fields: dict[str, Any], where: str) -> Record:
        names = tuple(fields)
        name = fields.pop(self.image_column, None)
        if self.captions:
            values = [fields.pop(column, None) for column in self.captions]
            captions = joined_captions(values, list(self.captions.values()))
        else:
            captions = first_captions([fields.pop(name, None) for name in ("captions", "caption")])
        image, stem, fault = self._image(name, where, names)
        if not captions.texts and not fault:
            fault = captions.fault or (
                f"no caption (fields: {', '.join(names)}); --caption-column chooses one"
            )
        split, key = _text(fields, "split"), _text(fields, "key")
        for field, value in (("split", split), ("key", key)):
            if value is not None and not isinstance(value, str):
                fault = fault or f"{field!r} is {short(value)}; make it a string"
        fit_fields(fields, captions)
        languages = captions.languages or named_languages(fields.get("languages"), captions.texts)
        if languages:
            fields.pop("languages", None)
        return Record(
            image=image,
            captions=captions.texts,
            split=split if isinstance(split, str) else self.split,
            key=key if isinstance(key, str) else stem,
            extra=fields,
            languages=languages,
            fault=fault or captions.fault,
        )

    def _image(self, name: Any, where: str, names: tuple[str, ...]) -> tuple[Image, str, str]:
        """Return a line's image, the key that it gives the sample, and what is wrong with it."""
        if not is_missing(name) and not base64_image(name) and not image_fault(name):
            return image_in(self.root, name), os.path.splitext(name)[0], ""
        place = os.path.basename(where)  # the same wherever the list lies
        if is_missing(name):
            there = ", ".join(names)
            fault = f"no {self.image_column!r} (fields: {there}); --image-column chooses one"
            return where, place, fault
        data = base64_image(name)
        if data:
            return self.stored.add(data, where), place, ""
        return where, place, image_fault(name)


def _text(fields: dict[str, Any], name: str) -> Any:
    """Take a field out of `fields`: a number is its text, nothing is None."""
    value = fields.pop(name, None)
    if value is None or is_missing(value):
        return None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value).strip()
    return value
