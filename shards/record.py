"""What every source yields: one image with its captions."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path, PosixPath
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.data.sample_fields import CAPTION_WEIGHTS


@dataclass(frozen=True, slots=True)
class Member:
    """An image inside a larger file: a member of a tar."""

    path: Path
    offset: int  # of its first byte in the file
    num_bytes: int
    url: str = ""  # that `path` is a copy of

    def __str__(self) -> str:
        return f"{self.url or self.path} at byte {self.offset}"


@dataclass(frozen=True, slots=True)
class Url:
    """An image to fetch over HTTP."""

    url: str

    def __str__(self) -> str:
        return self.url


Image = str | Path | Member | Url
"""A local path (as text: a million `Path`s take seconds), fsspec's, part of a tar, or a URL."""


def local_path(image: Image) -> str:
    """Return the path of the local file that holds the image; "" if it is elsewhere."""
    if isinstance(image, str):
        return image
    if isinstance(image, Member):
        return str(image.path)
    return str(image) if isinstance(image, PosixPath) else ""


@dataclass(frozen=True, slots=True)
class Record:
    """One image with its captions, as the source names them."""

    image: Image
    captions: tuple[str, ...]
    split: str
    key: str
    """The source's name of the sample; `keys.safe_keys` makes it fit for a tar."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields for the sample's JSON, such as `cocoid`."""
    languages: tuple[str, ...] = ()
    """The language of each caption, or empty where the source names none."""
    fault: str = ""
    """Why the source knows that the sample is bad; empty if it is not."""


def all_in_languages(records: Sequence[Record], codes: str) -> list[Record]:
    """Return the records with their captions in the languages of `codes` only, such as "en,de".

    Raises UserError for a language that no caption is in, or captions that name none.
    """
    wanted = [code.strip() for code in codes.split(",")]
    chosen = [in_languages(record, wanted) for record in records]
    there = sorted({language for record in records for language in record.languages if language})
    for code in wanted:
        if records and code not in there:
            raise UserError(
                f"--languages {codes!r}: no caption is in {code!r}; name some of those that there "
                f"are, with commas between: {','.join(there)}"
            )
    return chosen


def in_languages(record: Record, wanted: Collection[str]) -> Record:
    """Return the record with its captions in the wanted languages only.

    Raises UserError if it does not say which language its captions are in.
    """
    if record.captions and not record.languages:
        raise UserError(
            f"sample {record.key!r} ({record.image}): names no languages; leave --languages out"
        )
    pairs = zip(record.captions, record.languages, strict=True)
    kept = [(caption, language) for caption, language in pairs if language in wanted]
    extra, weights = record.extra, record.extra.get(CAPTION_WEIGHTS)
    if isinstance(weights, list) and len(weights) == len(record.captions):
        chosen = (language in wanted for language in record.languages)
        extra = {**extra, CAPTION_WEIGHTS: list(compress(weights, chosen))}
    return replace(
        record,
        extra=extra,
        captions=tuple(caption for caption, _ in kept),
        languages=tuple(language for _, language in kept),
    )
