"""What every source yields: one image with its captions."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One image with its captions, as the source names them."""

    image: Path
    captions: tuple[str, ...]
    split: str
    key: str
    """The source's name of the sample; `keys.safe_keys` makes it fit for a tar."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields for the sample's JSON, such as `cocoid`."""
