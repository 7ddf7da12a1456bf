"""One reading of captions for all sources, whatever form they have.

A caption is a string, a list of strings, or an object of these by language. Blank strings, null and
NaN are none; a number is its text; a byte-order mark is no part of a caption.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from dist_vse.common.terminal import short
from dist_vse.data.sample_fields import CAPTION_WEIGHTS, NEGATIVES

_MARK = "\ufeff"  # the byte-order mark


@dataclass(frozen=True, slots=True)
class Captions:
    """What a value says."""

    texts: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()  # one a text, or empty where none is named
    fault: str = ""  # why the value cannot be read, if so
    kept: tuple[bool, ...] = ()  # of a list: which entries are texts

    def beside(self, value: Any) -> Any:
        """Return a list with an entry a caption without those of blanks, all else as it is."""
        fits = isinstance(value, list) and len(value) == len(self.kept)
        return list(compress(value, self.kept)) if fits else value


def read_captions(value: Any) -> Captions:
    """Return the captions of a value from JSON, a table or a file."""
    if isinstance(value, str):  # most are
        text = _clean(value)
        return Captions((text,)) if text else Captions()
    try:
        if isinstance(value, list | tuple):
            kept = tuple(bool(_texts(entry)) for entry in value)
            return Captions(tuple(_texts(value)), kept=kept)
        if not isinstance(value, Mapping):
            return Captions(tuple(_texts(value)))
        pairs = [(text, str(language)) for language in value for text in _texts(value[language])]
        return Captions(tuple(text for text, _ in pairs), tuple(language for _, language in pairs))
    except TypeError:
        return Captions(fault=f"its caption is {short(value)}; make it a text or a list of texts")


def cell_captions(value: Any) -> Captions:
    """Return the captions of a cell; the text of a list of strings is read as that list."""
    if isinstance(value, str) and value.lstrip()[:1] == "[" and value.rstrip()[-1:] == "]":
        for parse in (json.loads, ast.literal_eval):
            try:
                content = parse(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(content, list) and all(isinstance(text, str) for text in content):
                return read_captions(content)
    return read_captions(value)


def first_captions(values: Sequence[Any]) -> Captions:
    """Return the captions of the first value that has any; else the first fault."""
    faulty = Captions()
    for value in values:
        if value is None:
            continue
        captions = read_captions(value)
        if captions.texts:
            return captions
        if not faulty.fault:
            faulty = captions
    return faulty


def named_columns(text: str) -> dict[str, str]:
    """Return the columns of captions in `alt=en,recaption`, each with its language or ""."""
    pairs = (name.partition("=") for name in text.split(","))
    return {column.strip(): language.strip() for column, _, language in pairs}


def joined_captions(values: Sequence[Any], languages: Sequence[str]) -> Captions:
    """Return the captions of several values, one after another, each in its language."""
    found = [read_captions(value) for value in values]
    if len(found) == 1 and not any(languages):
        return found[0]
    names = [
        name
        for captions, language in zip(found, languages, strict=True)
        for name in captions.languages or [language] * len(captions.texts)
    ]
    texts = tuple(text for captions in found for text in captions.texts)
    fault = next((captions.fault for captions in found if captions.fault), "")
    return Captions(texts, tuple(names) if any(names) else (), fault)


def fit_fields(fields: dict[str, Any], captions: Captions) -> None:
    """Bring the fields that say more about a sample's captions into the form that training reads.

    Lists with an entry a caption lose those of blank captions; negatives are read as captions are.
    """
    for name in ("languages", CAPTION_WEIGHTS):
        if name in fields:
            fields[name] = captions.beside(fields[name])
    if NEGATIVES in fields:
        false = read_captions(fields[NEGATIVES])
        if not false.fault:
            fields[NEGATIVES] = list(false.texts)


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
    return text.strip().strip(_MARK).strip() if _MARK in text else text.strip()
