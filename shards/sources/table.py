"""Tables with a row a caption (or an image): CSV, TSV and Parquet, by the names of columns."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.terminal import short
from dist_vse.data.index import image_id
from dist_vse.data.sample_fields import NEGATIVES
from dist_vse.shards.captions import cell_captions, is_missing, named_columns
from dist_vse.shards.public_url import public_url
from dist_vse.shards.record import Image, Record, Url
from dist_vse.shards.sources.paths import existing_folder, image_fault, image_in, url_fault
from dist_vse.shards.sources.rows import Row, parquet_rows, parts_by_split, text_rows
from dist_vse.shards.sources.stored_images import StoredImages, base64_image


# More than eight parameters: each but `path`, `rows` and `scratch` is an option of the command.
def read_table(
    path: Path,
    *,
    rows: "Rows",
    images: Path | None = None,
    split: str | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    split_column: str | None = None,
    key_column: str | None = None,
    language_column: str | None = None,
    negatives_column: str | None = None,
    scratch: Path | None = None,
    urls: bool = False,
) -> Iterator[Record]:
    """Yield the images of a table in the order in which they first come.

    Rows of one image are put together. `caption_column` may name several columns with commas
    between, each with its language: `caption_en=en,caption_de=de`; `language_column` names the
    language of a row's captions, and `negatives_column` holds texts that are false of its image.
    Paths start from `images`, or from the file's folder; with `urls` they are URLs instead. A row
    without a split is of `split` (train by default). An empty caption is none. Images that lie in
    the cells are copied into `scratch`. A row whose values can't be used is a bad sample.

    Raises UserError for a missing column or broken quotes, naming the row.
    """
    languages = named_columns(caption_column)
    more = (split_column, key_column, language_column, negatives_column)
    columns = _Columns(image_column, languages, *more)
    root = path if path.is_dir() else path.parent
    root = root if images is None else existing_folder(images)
    stored = StoredImages(scratch)
    naming = _URLS if urls else _PATHS
    groups = _groups(rows(path, columns.names), columns, split or "train", stored, naming)
    stored.close()
    for group in groups.values():
        image = group.image
        if isinstance(image, str) and not group.nowhere:
            image = Url(image) if urls else image_in(root, image)
        extra: dict[str, Any] = {NEGATIVES: group.negatives} if group.negatives else {}
        if isinstance(image, Url):
            extra["url"] = public_url(image.url)
        yield Record(
            image=image,
            captions=tuple(group.captions),
            split=group.split,
            key=group.key,
            extra=extra,
            languages=tuple(group.languages) if any(group.languages) else (),
            fault=group.fault,
        )


@dataclass(frozen=True)
class _Columns:
    image: str
    captions: dict[str, str]  # column to language, "" where none was given
    split: str | None
    key: str | None
    language: str | None
    negatives: str | None

    @property
    def names(self) -> list[str]:
        """All columns that are read."""
        more = (self.split, self.key, self.language, self.negatives)
        return [self.image, *self.captions, *(name for name in more if name is not None)]


@dataclass(frozen=True)
class _Naming:
    """What an image's name says, by the kind of name."""

    fault: Callable[[str], str]
    key: Callable[[str], str]


@dataclass
class _Group:
    """What the rows of one image said so far."""

    image: Image
    split: str
    key: str
    nowhere: bool = False  # the image is none: it says where the row stands
    captions: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    fault: str = ""


def _groups(
    rows: Iterable[Row],
    columns: _Columns,
    split: str,
    stored: StoredImages,
    naming: _Naming,
) -> dict[str | int, _Group]:
    """Put the rows together by image: by its path, or by its bytes."""
    groups: dict[str | int, _Group] = {}
    for where, row in rows:
        own = _text(columns.split and row[columns.split]) or split
        name, data = _image_of(row[columns.image])
        place = os.path.basename(where)  # the same wherever the table lies
        key = _text(columns.key and row[columns.key])
        if data:
            identity: str | int = image_id(data)
            if identity not in groups:
                member = stored.add(data, where)
                stem = _stem(name) if isinstance(name, str) else place
                groups[identity] = _Group(member, own, key or stem)
        elif is_missing(name) or not isinstance(name, str):
            identity = where
            fault = f"column {columns.image!r} is {short(row[columns.image])}; name an image file"
            groups[identity] = _Group(where, own, key or place, nowhere=True, fault=fault)
        else:
            identity = name
            if identity not in groups:
                fault, stem = naming.fault(name), naming.key(name)
                group = _Group(name, own, key or stem, fault=fault)
                if fault and naming is _PATHS:
                    group = _Group(where, own, key or place, nowhere=True, fault=fault)
                groups[identity] = group
        group = groups[identity]
        if group.split != own:
            raise UserError(
                f"{where}: {name or 'the image'} is of split {own!r}, but of {group.split!r} in "
                "an earlier row; fix one"
            )
        for column, language in columns.captions.items():
            said = _text(columns.language and row[columns.language]) or language
            captions = cell_captions(row[column])
            group.fault = group.fault or captions.fault
            group.captions += captions.texts
            group.languages += captions.languages or [said] * len(captions.texts)
        if columns.negatives:
            false = cell_captions(row[columns.negatives])
            group.fault = group.fault or false.fault
            group.negatives += (text for text in false.texts if text not in group.negatives)
    return groups


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _key_of_url(url: str) -> str:
    public = public_url(url)  # keys are file names in the tar, and show in messages
    return public if "?" in public else _stem(public)


_PATHS, _URLS = _Naming(image_fault, _stem), _Naming(url_fault, _key_of_url)


def _image_of(value: Any) -> tuple[Any, bytes]:
    """Return the path and the bytes of a cell; Hugging Face stores {bytes, path}."""
    if isinstance(value, bytes):
        return None, value
    if isinstance(value, dict) and "path" in value and "bytes" in value:
        return value["path"], value["bytes"] or b""
    data = base64_image(value)
    return (None, data) if data else (value, b"")


def _text(value: Any) -> str:
    """Return a cell's text; "" if it holds nothing. A split may be called 0."""
    return "" if is_missing(value) else str(value).strip()


Rows = Callable[[Path, Sequence[str]], Iterator[Row]]


def _with_table_options(read: Callable[..., Iterator[Record]]) -> Callable[..., Iterator[Record]]:
    """Make the options of `read_table` show among those of a function that passes them on."""
    own, table = inspect.signature(read), inspect.signature(read_table)
    parameters = {**table.parameters, **own.parameters}
    del parameters["options"], parameters["rows"], parameters["urls"]
    read.__signature__ = own.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
    return read


@_with_table_options
def read_csv(path: Path, *, separator: str = ",", **options: Any) -> Iterator[Record]:
    """Read a CSV file as `read_table`; its cells are parted by `separator`."""
    if len(separator) != 1:
        raise UserError(f"--separator {separator!r}: give one character")
    return read_table(path, rows=partial(text_rows, separator=separator, quoted=True), **options)


@_with_table_options
def read_tsv(path: Path, *, quoted: bool = False, **options: Any) -> Iterator[Record]:
    """Read a TSV file as `read_table`; quotation marks are text, unless it is `quoted`."""
    return read_table(path, rows=partial(text_rows, separator="\t", quoted=quoted), **options)


@_with_table_options
def read_parquet(path: Path, **options: Any) -> Iterator[Record]:
    """Read a Parquet file, or a folder of them, as `read_table`.

    Where no option names splits, those of a folder are what its files' names begin with.
    """
    if not path.is_dir() or options.get("split") or options.get("split_column"):
        yield from read_table(path, rows=parquet_rows, **options)
        return
    for split, parts in parts_by_split(path).items():
        rows = partial(parquet_rows, parts=parts)
        yield from read_table(path, rows=rows, **{**options, "split": split})
