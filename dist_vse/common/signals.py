"""Signals that ask a run to stop: a handler only sets a flag, the loop looks at it.

Who presses Ctrl-C a second time doesn't want to wait: that one ends the process as it is.
"""

import signal
from types import FrameType

_asked: int | None = None


def listen() -> None:
    """From now on SIGTERM, SIGUSR1, SIGUSR2 and a first SIGINT only ask for a stop."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _ask)


def asked() -> bool:
    """Tell whether this process was asked to stop; other ranks may not have been yet."""
    return _asked is not None


def _ask(number: int, _: FrameType | None) -> None:
    global _asked
    _asked = number
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
