"""What is searched for, and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Queries:
    """Texts and images to search for, answered in this order."""

    texts: Sequence[str] = ()
    images: Sequence[Path] = ()

    @property
    def names(self) -> list[str]:
        """What each query is called."""
        return [*self.texts, *map(str, self.images)]


@dataclass(frozen=True)
class Found:
    """The answers to one query, best first."""

    query: str  # the text, or the image's path
    keys: list[str]
    scores: list[float]  # cosine similarities
    captions: list[str]  # the first one of each image
