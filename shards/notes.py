"""Lines on standard error about what a command took for what."""

import sys

from dist_vse.common.terminal import message, say


def note(text: str) -> None:
    """Print a note that needs no answer."""
    say(f"note: {message(text)}", file=sys.stderr)
