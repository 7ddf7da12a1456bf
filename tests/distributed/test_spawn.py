"""Ranks that were started on this machine end with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_vse.distributed.spawn import run_on_ranks
from tests.support.waiting import is_running, wait_until

RANKS = 2
SECONDS = 120.0


def note_pid_and_wait(folder: Path) -> None:
    """What a rank does: longer than the test may take."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(SECONDS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(90)
def test_ranks_end_with_a_killed_parent_that_ignores_sigint(tmp_path: Path) -> None:
    """As a shell's background job does: its children ignore SIGINT too."""
    ignoring = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        parent = subprocess.Popen([sys.executable, "-m", __name__, str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, ignoring)
    try:
        ranks = wait_until(lambda: _pids(tmp_path), "the ranks to start", 30)
    finally:
        parent.terminate()
        parent.wait()
    wait_until(lambda: not any(map(is_running, ranks)), "the ranks to end", 30)


def _pids(folder: Path) -> list[int]:
    """Return the ranks' numbers once all have noted theirs."""
    found = [int(path.name) for path in folder.iterdir()]
    return found if len(found) == RANKS else []


if __name__ == "__main__":
    run_on_ranks(note_pid_and_wait, RANKS, Path(sys.argv[1]))
