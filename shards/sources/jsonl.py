"""JSON lines: one image a line, with its caption or captions."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from shards.record import Record
from shards.sources.paths import existing_file, existing_folder, image_in


def read_jsonl(
    path: Path, *, images: Path | None = None, split: str | None = None
) -> Iterator[Record]:
    """Yield a record for each line `{"image": path, "captions": [...], "split"?, "key"?}`.

    `"caption": "..."` stands for one caption, `"captions": {"en": [...], "de": "..."}` for those of
    several languages. Paths start from `images`, or from the file's
    folder. A line without a split is of `split` (train by default). Other fields go into the
    sample's JSON.

    Raises UserError, naming the line, for anything else.
    """
    root = existing_folder(images) if images else path.parent
    with existing_file(path).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _record(line, f"{path}:{number}", root, split or "train")


def _record(line: bytes, where: str, root: Path, split: str) -> Record:
    try:
        fields = json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{where}: no JSON ({error}); fix the line") from error
    if not isinstance(fields, dict):
        raise UserError(
            f'{where}: must be an object such as {{"image": "a.jpg", "caption": "..."}}'
        )
    image = _text(fields, "image", where)
    if not image:
        raise UserError(f'{where}: no "image"; give the path of the image')
    captions, languages = _captions(fields, where)
    return Record(
        image=image_in(root, image),
        captions=captions,
        split=_text(fields, "split", where) or split,
        key=_text(fields, "key", where) or os.path.splitext(image)[0],
        extra=fields,
        languages=languages,
    )


def _text(fields: dict[str, Any], name: str, where: str) -> str | None:
    """Take the field out of `fields`; it must be a string where it is present."""
    value = fields.pop(name, None)
    if value is not None and not isinstance(value, str):
        raise UserError(f'{where}: "{name}" is {value!r}; make it a string')
    return value


def _captions(fields: dict[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Take the captions out of `fields`; return them, and their languages if they are named."""
    if "caption" in fields and "captions" in fields:
        raise UserError(f'{where}: both "caption" and "captions"; keep one')
    if "caption" in fields:
        caption = _text(fields, "caption", where)
        return () if caption is None else (caption,), ()
    captions = fields.pop("captions", None) or []
    if not isinstance(captions, dict):
        return _texts(captions, captions, where), ()
    of_language = {
        language: _texts([texts] if isinstance(texts, str) else texts, captions, where)
        for language, texts in captions.items()
    }
    languages = (language for language, texts in of_language.items() for _ in texts)
    return tuple(text for texts in of_language.values() for text in texts), tuple(languages)


def _texts(texts: Any, captions: Any, where: str) -> tuple[str, ...]:
    if not isinstance(texts, list) or not all(isinstance(c, str) for c in texts):
        raise UserError(
            f'{where}: "captions" is {captions!r}; make it a list of strings, or an object of such '
            "lists by language"
        )
    return tuple(texts)
