"""Tables with a row a caption (or an image): CSV, TSV and Parquet, by the names of columns."""

import csv
import difflib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.files import is_leftover
from shards.record import Record
from shards.sources.paths import existing_file, existing_folder, image_in

Row = tuple[str, dict[str, Any]]  # where it stands, its columns


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
) -> Iterator[Record]:
    """Yield the images of a table in the order in which they first come.

    Rows of one image are put together. `caption_column` may name several columns with commas
    between, each with its language: `caption_en=en,caption_de=de`; `language_column` names the
    language of a row's captions. Paths start from `images`, or from the file's folder; a row
    without a split is of `split` (train by default). An empty caption is none.

    Raises UserError, naming the row, for a missing column or value, or broken quotes.
    """
    pairs = (name.partition("=") for name in caption_column.split(","))
    languages = {column.strip(): language.strip() for column, _, language in pairs}
    columns = _Columns(image_column, languages, split_column, key_column, language_column)
    root = path if path.is_dir() else path.parent
    root = root if images is None else existing_folder(images)
    for image, group in _groups(rows(path, columns), columns, split or "train").items():
        yield Record(
            image=image_in(root, image),
            captions=tuple(group.captions),
            split=group.split,
            key=group.key,
            languages=tuple(group.languages) if any(group.languages) else (),
        )


@dataclass(frozen=True)
class _Columns:
    image: str
    captions: dict[str, str]  # column to language, "" where none was given
    split: str | None
    key: str | None
    language: str | None

    @property
    def names(self) -> list[str]:
        """All columns that are read."""
        more = (self.split, self.key, self.language)
        return [self.image, *self.captions, *(name for name in more if name is not None)]


@dataclass
class _Group:
    """What the rows of one image said so far."""

    split: str
    key: str
    captions: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)


def _groups(rows: Iterable[Row], columns: _Columns, split: str) -> dict[str, _Group]:
    """Put the rows together by image."""
    groups: dict[str, _Group] = {}
    for where, row in rows:
        image = row[columns.image]
        if not isinstance(image, str) or not image:
            raise UserError(f"{where}: column {columns.image!r} is {image!r}; name an image file")
        own = str((columns.split and row[columns.split]) or split)
        key = str((columns.key and row[columns.key]) or os.path.splitext(image)[0])
        group = groups.setdefault(image, _Group(own, key))
        if group.split != own:
            raise UserError(
                f"{where}: {image} is of split {own!r}, but of {group.split!r} in an earlier row; "
                "fix one"
            )
        for column, language in columns.captions.items():
            said = str(row[columns.language] or "") if columns.language else language
            for caption in _texts(row[column], column, where):
                group.captions.append(caption)
                group.languages.append(said)
    return groups


def _texts(value: Any, column: str, where: str) -> list[str]:
    """Return the captions of a cell: none, one, or a list of them."""
    values = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in values):
        raise UserError(f"{where}: column {column!r} is {value!r}; make it a text")
    return [text.strip() for text in values if text and text.strip()]


def _text_rows(path: Path, columns: _Columns, delimiter: str) -> Iterator[Row]:
    with existing_file(path).open("rb") as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            _check_columns(path, columns, header)
            for cells in reader:
                if not cells:
                    continue
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise UserError(
                        f"{where}: {len(cells)} cells where the header has {len(header)}; fix it"
                    )
                yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}; fix the quotes") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: no UTF-8 ({error.reason}); save the file as UTF-8") from error


def _parquet_rows(path: Path, columns: _Columns) -> Iterator[Row]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: Parquet needs a package more; pip install 'dist_vse[parquet]'"
        ) from None
    files = [path]
    if path.is_dir():
        files = [f for f in sorted(path.glob("*.parquet")) if not is_leftover(f.name)]
    for part in files:
        number = 0
        with existing_file(part).open("rb") as file:
            try:
                content = parquet.ParquetFile(file)
                _check_columns(part, columns, content.schema_arrow.names)
                for batch in content.iter_batches(columns=columns.names):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{part}: row {number}", row
            except arrow.ArrowException as error:
                raise UserError(
                    f"{part}: no Parquet file, or cut ({first_line(error)}); give another, or copy "
                    "it again"
                ) from error


def _check_columns(path: Path, columns: _Columns, header: Sequence[str]) -> None:
    for name in columns.names:
        if name not in header:
            near = difflib.get_close_matches(name, header, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; name it, as by --image-column"
            raise UserError(f"{path}: no column {name!r} (columns: {', '.join(header)}){hint}")


Rows = Callable[[Path, _Columns], Iterator[Row]]

read_csv = partial(read_table, rows=partial(_text_rows, delimiter=","))
read_tsv = partial(read_table, rows=partial(_text_rows, delimiter="\t"))
read_parquet = partial(read_table, rows=_parquet_rows)
