"""The caption files of Flickr30K and Flickr8K, as their authors and as Kaggle give them.

One caption per line, in one of these forms; the first line decides which. Those with commas quote
as CSV does; in the others a quotation mark is part of the caption.

    1000092795.jpg#0<TAB>Two young guys ...       results_20130124.token, Flickr8k.token.txt
    image_name| comment_number| comment           results.csv
    image,caption                                 captions.txt
    image_name,comment_number,comment             captions.txt of Flickr30K
"""

import re
from collections.abc import Iterator
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.shards.captions import read_captions
from dist_vse.shards.record import Record
from dist_vse.shards.sources.paths import (
    existing_file,
    existing_folder,
    image_fault,
    image_in,
    read_lines,
)

_TOKEN = re.compile(r"(?P<image>[^\t]+)#(?P<number>\d+)\t(?P<caption>.*)")
# One line of results.csv lacks the second bar: "2199200615.jpg| 4   A dog runs ..."
_BARS = re.compile(r"(?P<image>[^|]+?)\s*\|\s*(?P<number>\d+)\s*(?:\||\s)\s*(?P<caption>.*)")
_PAIR = re.compile(r"(?P<image>[^,]+),(?P<caption>.*)(?P<number>)")
_TRIPLE = re.compile(r"(?P<image>[^,]+),\s*(?P<number>\d+),(?P<caption>.*)")
_QUOTING = (_PAIR, _TRIPLE)
_HEADERS = {  # without blanks
    "image_name|comment_number|comment": _BARS,
    "image,caption": _PAIR,
    "image_name,comment_number,comment": _TRIPLE,
}


def read_flickr(
    path: Path, *, images: Path | None = None, split: str | None = None
) -> Iterator[Record]:
    """Yield the images of the file in its order, each with all its captions by their numbers.

    All is of `split` (train by default): the splits that papers use are in Karpathy's file.
    Images lie under `images`, or beside the file.

    Raises UserError, naming the line, for one that is of another form than the first.
    """
    lines = read_lines(existing_file(path))
    root = existing_folder(images) if images else path.parent
    form, start = _form(lines[0])
    captions: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines[start:], start + 1):
        if not line.strip():
            continue
        found = form.fullmatch(line)
        if found is None:
            raise UserError(
                f"{path}:{number}: {line[:60]!r} is no caption like those before it; fix the line"
            )
        of_image = captions.setdefault(found["image"].strip(), [])
        caption = found["caption"].strip()
        caption = _unquoted(caption) if form in _QUOTING else caption
        of_image.append((int(found["number"] or len(of_image)), caption))
    for image, numbered in captions.items():
        texts = [text for _, text in sorted(numbered, key=lambda pair: pair[0])]
        yield Record(
            image=image_in(root, image),
            captions=read_captions(texts).texts,
            split=split or "train",
            key=Path(image).stem,
            extra={"filename": image},
            fault=image_fault(image),
        )


def _form(first: str) -> tuple[re.Pattern[str], int]:
    """Return what a line looks like, and how many lines the header takes."""
    form = _HEADERS.get(first.replace(" ", "").lower())
    return (form, 1) if form else (_TOKEN, 0)


def _unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"').strip()
    return text
