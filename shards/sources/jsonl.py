"""JSON lines: one image a line, with its caption or captions."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.terminal import short
from dist_vse.shards.captions import first_captions, is_missing, named_languages
from dist_vse.shards.json_text import load_json
from dist_vse.shards.record import Record
from dist_vse.shards.sources.paths import existing_folder, image_fault, image_in, open_list


def read_jsonl(
    path: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
) -> Iterator[Record]:
    """Yield a record for each line `{"image": path, "captions": [...], "split"?, "key"?}`.

    `"caption": "..."` stands for one caption, `"captions": {"en": [...], "de": "..."}` for those of
    several languages; `caption_column` names another field. Paths start from `images`, or from the
    file's folder. A line without a split is of `split` (train by default). Other fields go into the
    sample's JSON. A line whose values can't be used is a bad sample.

    Raises UserError, naming the line, for what is no JSON object.
    """
    root = existing_folder(images) if images else path.parent
    with open_list(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                fields = json_object(line, f"{path}:{number}")
                yield _record(fields, f"{path}:{number}", root, split, image_column, caption_column)


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """Return the object on a line. Raises UserError if it is none."""
    try:
        fields = load_json(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{where}: no JSON ({error}); fix the line") from error
    if not isinstance(fields, dict):
        raise UserError(
            f'{where}: must be an object such as {{"image": "a.jpg", "caption": "..."}}'
        )
    return fields


def _record(
    fields: dict[str, Any],
    where: str,
    root: Path,
    split: str | None,
    image_column: str,
    caption_column: str | None,
) -> Record:
    names = ", ".join(fields)
    image = fields.pop(image_column, None)
    columns = [caption_column] if caption_column else ["captions", "caption"]
    captions = first_captions([fields.pop(column, None) for column in columns])
    fault = captions.fault
    if not captions.texts and not fault:
        fault = f"no caption (fields: {names}); --caption-column chooses one"
    if is_missing(image):
        fault = f"no {image_column!r} (fields: {names}); --image-column chooses one"
    fault = fault if is_missing(image) else image_fault(image) or fault
    own_split, key = (_text(fields, name) for name in ("split", "key"))
    for name, value in (("split", own_split), ("key", key)):
        if not isinstance(value, str | None):
            fault = fault or f"{name!r} is {short(value)}; make it a string"
    languages = captions.languages or named_languages(fields.get("languages"), captions.texts)
    if languages:
        fields.pop("languages", None)
    found = isinstance(image, str) and not is_missing(image)
    return Record(
        image=image_in(root, image) if found else where,
        captions=captions.texts,
        split=own_split if isinstance(own_split, str) else split or "train",
        key=key if isinstance(key, str) else os.path.splitext(image)[0] if found else where,
        extra=fields,
        languages=languages,
        fault=fault,
    )


def _text(fields: dict[str, Any], name: str) -> Any:
    """Take a field out of `fields`: a number is its text, nothing is None."""
    value = fields.pop(name, None)
    if is_missing(value):
        return None
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
