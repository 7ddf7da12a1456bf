"""Text from outside on its way to a terminal, or into a message."""

import io
import re
import reprlib
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.text import Text  # not here: `dist-vse --help` does without it

MAX_CHARS = 2000  # of one message: about a screen

# C0 but tab and line feed, DEL, C1, and what changes the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


_URL = re.compile(
    r"""([A-Za-z][A-Za-z0-9+.-]*://)([^/\s@'"?#]*@)?([^\s?'"]*)(\?[^\s'"]*[^\s'":;,.)])?"""
)


def without_secrets(text: str) -> str:
    """Return a text whose URLs have no user, password and query: signatures stand there."""
    if "://" not in text:
        return text
    return _URL.sub(lambda url: url[1] + url[3] + ("?..." if url[4] else ""), text)


def printable(text: object) -> str:
    """Return a text without the control characters that a terminal would obey.

    Keys, captions, paths and messages come from files that somebody else may have made.
    """
    shown = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))
    return shown.encode("utf-8", "backslashreplace").decode()  # a file's name may be no Unicode


def one_line(text: object) -> str:
    """Return a text as `printable` does, on one line."""
    return " ".join(printable(text).split())


def message(text: object) -> str:
    """Return a message that is printable, and no longer than a screen: its middle is cut out."""
    shown = printable(text)
    if len(shown) <= MAX_CHARS:
        return shown
    half = MAX_CHARS // 2
    return f"{shown[:half]} [... {len(shown) - 2 * half:,} characters ...] {shown[-half:]}"


def say(text: object, *, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Print a text as `printable` returns it; all that is no table of rich's goes through here."""
    print(printable(text), file=file, end=end, flush=flush)


def accept_any_text() -> None:
    """Print what the terminal's encoding has no letter for as `?`, where Python would raise."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def plain(text: object) -> "Text":
    """Return a printable text for rich's tables and consoles, where `[red]` stays `[red]`."""
    from rich.text import Text

    return Text(printable(text))


class _Short(reprlib.Repr):
    """`repr` of a line at most; bytes are counted, not shown."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_bytes(self, x: bytes, level: int) -> str:
        return f"<{len(x):,} bytes>"


_SHORT = _Short()


def short(value: Any) -> str:
    """Return the `repr` of a value from a file, short enough for a message."""
    return _SHORT.repr(value)
