"""One reading of captions for all sources, whatever form they have.

A caption is a string, a list of strings, or an object of these by language. Blank strings, null and
NaN are none; a number is its text; a byte-order mark is no part of a caption.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_vse.common.terminal import short

_BLANKS = "\ufeff"


@dataclass(frozen=True, slots=True)
class Captions:
    """What a value says."""

    texts: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()  # one a text, or empty where none is named
    fault: str = ""  # why the value cannot be read, if so


def read_captions(value: Any) -> Captions:
    """Return the captions of a value from JSON, a table or a file."""
    try:
        if not isinstance(value, Mapping):
            return Captions(tuple(_texts(value)))
        pairs = [(text, str(language)) for language in value for text in _texts(value[language])]
        return Captions(tuple(text for text, _ in pairs), tuple(language for _, language in pairs))
    except TypeError:
        return Captions(fault=f"its caption is {short(value)}; make it a text or a list of texts")


def first_captions(values: Sequence[Any]) -> Captions:
    """Return the captions of the first value that has any; else the first fault."""
    found = [read_captions(value) for value in values]
    for having in ("texts", "fault"):
        for captions in found:
            if getattr(captions, having):
                return captions
    return Captions()


def named_languages(value: Any, texts: Sequence[str]) -> tuple[str, ...]:
    """Return the field `languages` of a sample's JSON if it names one a caption; else nothing."""
    fits = isinstance(value, list) and len(value) == len(texts)
    return tuple(value) if fits and all(isinstance(name, str) for name in value) else ()


def is_missing(value: Any) -> bool:
    """Return whether a value stands for nothing: null, NaN, or blank."""
    return value is None or value != value or (isinstance(value, str) and not _clean(value))


def _texts(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        if any(isinstance(entry, list | tuple) for entry in value):
            raise TypeError("a list in a list")
        return [text for entry in value for text in _texts(entry)]
    if is_missing(value):
        return []
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError("no text")
    return [_clean(str(value))]


def _clean(text: str) -> str:
    return text.strip().strip(_BLANKS).strip()
