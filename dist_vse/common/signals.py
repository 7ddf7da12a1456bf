"""Signals that ask a run to stop: a handler sets a flag, and the training loop checks it.

A second Ctrl-C ends the process at once.
"""

import signal
from types import FrameType

_asked: int | None = None


def listen() -> None:
    """Install handlers: SIGTERM, SIGUSR1, SIGUSR2 and a first SIGINT only ask for a stop."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _ask)


def asked() -> bool:
    """Return whether this process was asked to stop; other ranks may not have been yet."""
    return _asked is not None


def _ask(number: int, _: FrameType | None) -> None:
    global _asked
    _asked = number
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
