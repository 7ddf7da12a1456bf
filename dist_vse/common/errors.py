"""The one exception for errors that a user can fix."""

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator
from pathlib import Path

from dist_vse.common.terminal import without_secrets

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """The user's input is wrong: the message says what, where, and what to do.

    Commands print it as one line and exit with code 2. Any other exception is our bug and shows its
    traceback. Whatever URLs it names, it keeps no secret of them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


def unknown_name(key: str, value: str, names: Iterable[str]) -> UserError:
    """Return the error for a name that is none of those known; it gives the nearest one."""
    names = list(names)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}"
    return UserError(f"{key}={value!r} is unknown; {hint}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, to quote it inside a UserError."""
    return (str(error).strip() or repr(error)).splitlines()[0]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of writing there (a full disk, missing permission) into a UserError."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in FULL else "give a path that can be written"
        raise UserError(f"{path}: can't be written ({first_line(error)}); {remedy}") from error
