"""The rows of a table, one at a time, each with where it stands."""

import csv
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.files import is_leftover
from dist_vse.shards.notes import note
from dist_vse.shards.sources.paths import SPLITS, open_list, where_instead

Row = tuple[str, dict[str, Any]]  # where it stands, its columns

_WORD = re.compile(r"[^a-z]")  # what ends the first word of a name
_BATCH_ROWS = 256  # few enough that images in the cells fit into memory
_COLUMNS_SHOWN = 20

csv.field_size_limit(2**31 - 1)  # a caption may be long


def text_rows(path: Path, columns: Sequence[str], *, separator: str, quoted: bool) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file.

    Raises UserError, naming the row, for a missing or doubled column and broken quotes.
    """
    warned = quoted
    with open_list(path) as file:
        text = io.TextIOWrapper(cast(io.BufferedReader, file), encoding="utf-8-sig", newline="")
        reader = csv.reader(
            text,
            delimiter=separator,
            strict=True,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        )
        try:
            header = next(reader, None)
            if header is None:
                raise UserError(f"{path}: is empty; give a table with a header")
            check_columns(path, columns, header, separator)
            for cells in reader:
                if not cells:
                    continue
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise UserError(
                        f"{where}: {len(cells)} cells where the header has {len(header)}; fix it"
                    )
                if not warned and any(_looks_quoted(cell) for cell in cells):
                    note(
                        f"{where}: quotation marks are taken as text; --quoted reads them as CSV's"
                    )
                    warned = True
                yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            what = "line" if "NUL" in str(error) else "quotes"
            raise UserError(f"{path}:{reader.line_num}: {error}; fix the {what}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: no UTF-8 ({error.reason}); save the file as UTF-8") from error
        finally:
            text.detach()


def parquet_rows(
    path: Path, columns: Sequence[str] | None, *, parts: Sequence[Path] = ()
) -> Iterator[Row]:
    """Yield the rows of a Parquet file, or of those in a folder, or of some `parts` of it.

    Only these columns of them, or all.

    Raises UserError for a missing column, or what is no Parquet file.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: Parquet needs a package more; pip install 'dist_vse[parquet]'"
        ) from None
    for part in parts or (parquet_parts(path) if path.is_dir() else [path]):
        number = 0
        with open_list(part) as file:
            try:
                content = parquet.ParquetFile(file)
                check_columns(part, columns or (), content.schema_arrow.names)
                for batch in content.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{part}: row {number}", row
            except arrow.ArrowException as error:
                raise UserError(
                    f"{part}: no Parquet file, or cut ({first_line(error)}); give another, or copy "
                    "it again"
                ) from error


def parquet_parts(folder: Path) -> list[Path]:
    """Return the Parquet files in a folder, by name. Raises UserError if there is none.

    A note names sub-folders that hold some as well, which are not read.
    """
    parts = [f for f in sorted(folder.glob("*.parquet")) if not is_leftover(f.name)]
    if not parts:
        hint = where_instead(folder, ".parquet")
        raise UserError(f"{folder}: no Parquet files here; {hint}")
    for child in sorted(folder.iterdir()):
        if not is_leftover(child.name) and child.is_dir() and any(child.glob("*.parquet")):
            note(f"{child}: its Parquet files are not read; shard that folder too")
    return parts


def parts_by_split(folder: Path) -> dict[str, list[Path]]:
    """Return a folder's Parquet files by the split that the hub's names begin with.

    `train-00000-of-00002.parquet` and `validation.parquet` name one; others are of train.
    """
    splits: dict[str, list[Path]] = {}
    for part in parquet_parts(folder):
        splits.setdefault(SPLITS.get(_WORD.split(part.name.lower())[0], "train"), []).append(part)
    if splits.keys() != {"train"}:
        counts = ", ".join(f"{len(parts)} of {split}" for split, parts in sorted(splits.items()))
        note(f"{folder}: by their names, its Parquet files are {counts}; --split makes them one")
    return splits


def _looks_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def check_columns(
    path: Path, columns: Sequence[str], header: Sequence[str], separator: str = ""
) -> None:
    """Raise UserError for a column that the header has not, or has twice."""
    for name in columns:
        if name in header:
            if list(header).count(name) > 1:
                raise UserError(f"{path}: column {name!r} is there twice; rename one")
            continue
        by_letters = {column.lower(): column for column in header}
        near = difflib.get_close_matches(name.lower(), by_letters, n=1)
        option = "--url-column" if name == "url" else "--image-column"
        hint = f"; did you mean {by_letters[near[0]]!r}?" if near else f"; name it, as by {option}"
        for other, called in (("\t", "tab"), (";", "semicolon"), (",", "comma")):
            if separator not in ("", other) and len(header) == 1 and other in header[0]:
                hint = f"; the separator is a {called}: use `dist-vse shard "
                hint += {"\t": "tsv`", ";": "csv --separator ';'`", ",": "csv`"}[other]
        there = [column[:40] for column in header[:_COLUMNS_SHOWN]]
        there += ["..."] if len(header) > _COLUMNS_SHOWN else []
        raise UserError(f"{path}: no column {name!r} (columns: {', '.join(there)}){hint}")
