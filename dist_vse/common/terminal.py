"""Text on its way to a terminal."""

import re

# C0 but tab and line feed, DEL, C1, and what changes the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """Return a text without the control characters that a terminal would obey.

    Keys, captions, paths and messages come from files that somebody else may have made.
    """
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))


def one_line(text: object) -> str:
    """Return a text as `printable` does, on one line."""
    return " ".join(printable(text).split())
