"""What every source yields: one image with its captions."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Member:
    """An image that is a stretch of a larger file: a member of a tar."""

    path: Path
    offset: int  # of its first byte in the file
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}"


@dataclass(frozen=True, slots=True)
class Record:
    """One image with its captions, as the source names them."""

    image: Path | Member
    captions: tuple[str, ...]
    split: str
    key: str
    """The source's name of the sample; `keys.safe_keys` makes it fit for a tar."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields for the sample's JSON, such as `cocoid`."""
    languages: tuple[str, ...] = ()
    """The language of each caption, or nothing where the source tells none."""
    fault: str = ""
    """Why the source knows it to be bad, if it does."""
