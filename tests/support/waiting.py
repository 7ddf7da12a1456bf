"""Wait for what another process or thread does, with an end to the patience."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 150


def wait_until(done: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Poll until `done()` is true; return what it returned. Fails after `patience_s`."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        value = done()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {patience_s} s for {what}")


def is_running(pid: int) -> bool:
    """Return whether a process lives; one that only waits to be reaped does not. Needs /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
