"""Ranks that were started on this machine end with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_vse.distributed.spawn import run_on_ranks

RANKS = 2
SECONDS = 60.0


def note_pid_and_wait(folder: Path) -> None:
    """What a rank does: longer than the test may take."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(SECONDS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(50)
def test_ranks_end_with_a_killed_parent_that_ignores_sigint(tmp_path: Path) -> None:
    """As a shell's background job does: its children ignore SIGINT too."""
    ignoring = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        parent = subprocess.Popen([sys.executable, "-m", __name__, str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, ignoring)
    try:
        while len(found := list(tmp_path.iterdir())) < RANKS:
            assert parent.poll() is None
            time.sleep(0.1)
    finally:
        parent.terminate()
        parent.wait()
    ranks = [int(path.name) for path in found]
    while any(_runs(rank) for rank in ranks):  # else the time limit ends the test
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    """Return whether a process runs; one that has ended may not have been waited for."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


if __name__ == "__main__":
    run_on_ranks(note_pid_and_wait, RANKS, Path(sys.argv[1]))
