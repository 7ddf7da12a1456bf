"""The one exception for what a user can mend."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Something the user gave is wrong: the message says what, where, and what to do.

    Commands print it as one line and end with exit code 2; any other exception is a fault of
    ours and shows its traceback.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, to quote it inside a UserError."""
    return (str(error).strip() or repr(error)).splitlines()[0]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write there (a full disk, no right to) into a UserError."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in FULL else "give a place that can be written"
        raise UserError(f"{path}: can't be written ({first_line(error)}); {remedy}") from error
