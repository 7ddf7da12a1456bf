"""The optional fields of a sample's JSON that training reads, and what they must hold."""

from collections.abc import Mapping
from typing import Any

CAPTION_WEIGHTS = "caption_weights"
"""How often each caption is drawn: one number a caption."""
NEGATIVES = "negatives"
"""Texts that are false of the image, such as its captions with two words exchanged."""
MIN_WEIGHT, MAX_WEIGHT = 1e-12, 1e12
OPTIONAL_FIELDS = (CAPTION_WEIGHTS, NEGATIVES)


def check_fields(fields: Mapping[str, Any], num_captions: int) -> None:
    """Raise ValueError if one of the optional fields does not hold what it must."""
    caption_weights(fields, num_captions)
    negatives(fields)


def negatives(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a sample's negatives without blank ones; none where there is no such field.

    Raises ValueError for what is no list of texts.
    """
    value = fields.get(NEGATIVES)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{NEGATIVES} must be a list of texts")
    return tuple(text for text in value if text.strip())


def caption_weights(fields: Mapping[str, Any], num_captions: int) -> tuple[float, ...]:
    """Return the weights of a sample's captions; none where there is no such field.

    A weight is 0, or from `MIN_WEIGHT` to `MAX_WEIGHT`: captions can't be drawn by a sum that is
    infinite or too small. Raises ValueError for what is no list of as many weights, or for zeros
    alone.
    """
    value = fields.get(CAPTION_WEIGHTS)
    if value is None:
        return ()
    fits = isinstance(value, list) and len(value) == num_captions
    if not fits or not all(type(x) in (int, float) and _can_weigh(x) for x in value):
        raise ValueError(
            f"{CAPTION_WEIGHTS} must be {num_captions} numbers: 0, or {MIN_WEIGHT:g} to "
            f"{MAX_WEIGHT:g}"
        )
    if value and not any(value):
        raise ValueError(f"{CAPTION_WEIGHTS} are all 0: no caption could be drawn")
    return tuple(map(float, value))


def _can_weigh(number: float) -> bool:
    return number == 0 or MIN_WEIGHT <= number <= MAX_WEIGHT
