"""Lists of URLs with captions: CSV, TSV, Parquet and JSON lines, by the names of columns."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.shards.record import Record
from dist_vse.shards.sources.jsonl import json_objects
from dist_vse.shards.sources.rows import Row, check_columns, parquet_rows, text_rows
from dist_vse.shards.sources.table import Rows, read_parquet, read_table


def read_urls(
    path: Path,
    *,
    split: str | None = None,
    url_column: str = "url",
    caption_column: str = "caption",
    split_column: str | None = None,
    key_column: str | None = None,
    language_column: str | None = None,
    negatives_column: str | None = None,
) -> Iterator[Record]:
    """Yield the images of a list as `read_table` does: rows of one URL are put together.

    The file's name says what it is. Raises UserError for another name, and as `read_table`.
    """
    options: dict[str, Any] = {
        "image_column": url_column,
        "caption_column": caption_column,
        "split": split,
        "split_column": split_column,
        "key_column": key_column,
        "language_column": language_column,
        "negatives_column": negatives_column,
        "urls": True,
    }
    if path.is_dir():
        return read_parquet(path, **options)
    return read_table(path, rows=_rows(path), **options)


def _rows(path: Path) -> Rows:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    readers: dict[str, Rows] = {
        ".csv": partial(text_rows, separator=",", quoted=True),
        ".tsv": partial(text_rows, separator="\t", quoted=False),
        ".parquet": parquet_rows,
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
        ".json": _jsonl_rows,
    }
    if suffix not in readers:
        raise UserError(f"{path}: must be called {', '.join(readers)}, or be a folder of Parquet")
    return readers[suffix]


def _jsonl_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the lines; fields that a line has not are missing values."""
    checked = False
    for where, fields in json_objects(path):
        if not checked:
            check_columns(path, columns, list(fields))
            checked = True
        yield where, {name: fields.get(name) for name in columns}
