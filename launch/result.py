"""How a rank ended, beside its log.

It is JSON, and the pickle that submitit leaves there is never read: reading a pickle runs code, and
a run's folder may come from somebody else.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from dist_vse.common.files import write_json
from dist_vse.common.reading import BadFileError, read_json

_MAX_BYTES = 1 << 16
_MAX_MESSAGE = 400


@dataclass(frozen=True)
class Result:
    """The end of one rank."""

    code: int
    """Exit code; 1 after an error."""
    error: str = ""
    """The error's type and message; empty if there was none."""


def result_path(log: Path) -> Path:
    """Return where a rank's result is, from the path of its log (stderr)."""
    return log.with_name(log.name.removesuffix("_log.err") + "_result.json")


def write_result(log: Path, result: Result) -> None:
    """Write a rank's result. Raises OSError."""
    write_json(result_path(log), asdict(result), fsync=True)


def read_result(log: Path) -> Result | None:
    """Return a rank's result, None if it left none. Raises BadFileError if the file is damaged."""
    path = result_path(log)
    if not path.exists():
        return None
    content = read_json(path, max_bytes=_MAX_BYTES)
    code, error = content.get("code"), content.get("error")
    if type(code) is not int or not isinstance(error, str) or not 0 <= code < 256:
        raise BadFileError("holds no exit code and error")
    return Result(code, error)


def last_message(trace: str) -> str:
    """Return the message at the end of a traceback, on one line."""
    lines = trace.rstrip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    message = " ".join(lines[frames[-1] + 1 if frames else 0 :]) or lines[-1].strip()
    return message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + " ..."
