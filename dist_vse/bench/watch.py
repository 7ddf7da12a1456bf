"""Starts a training in processes of its own; notes when its steps end and what memory it takes.

A step ends when its line of log arrives here, so the clock is the same for every trainer. Memory
is a process's largest resident set, as the kernel keeps it.
"""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dist_vse.bench.memory import status_bytes
from dist_vse.errors import UserError

LOOK_S = 0.1  # between two looks at the memory
TAIL = 80  # lines of a failed training that are shown


@dataclass(frozen=True)
class Watched:
    """A training that has ended well."""

    step_at: list[float]  # seconds on one clock; item k - 1 for step k
    rank_bytes: int  # the largest peak of any rank
    worker_bytes: int  # and of any process that a rank started; 0 without one

    def seconds_a_step(self, warm_up: int) -> float:
        """Return the mean over the steps after the first `warm_up`."""
        return (self.step_at[-1] - self.step_at[warm_up - 1]) / (len(self.step_at) - warm_up)


def watch(
    command: Sequence[str],
    step: re.Pattern[str],
    *,
    steps: int,
    cwd: Path,
    environment: Mapping[str, str],
    timeout_s: float,
) -> Watched:
    """Run a launcher's command to its end; lines that `step` matches are its steps.

    Raises UserError, with the end of its log, if it fails, takes too long, or takes other steps.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all of it can be ended
    )
    late = threading.Timer(timeout_s, _end, [process.pid])
    peaks: dict[int, tuple[bool, int]] = {}
    looker = threading.Thread(target=_look, args=(process, peaks), daemon=True)
    late.start()
    looker.start()
    lines, step_at = [], []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if step.search(line):
                step_at.append(time.perf_counter())
            lines.append(line)
        process.wait()
    finally:
        late.cancel()
        _end(process.pid)
    looker.join()
    if process.returncode != 0 or len(step_at) != steps:
        code = f"exit code {process.returncode}, {len(step_at)} of {steps} steps in {timeout_s} s"
        raise UserError(f"{' '.join(command)}: {code}\n{''.join(lines[-TAIL:])}")
    of_ranks = [peak for is_rank, peak in peaks.values() if is_rank]
    of_workers = [peak for is_rank, peak in peaks.values() if not is_rank]
    return Watched(step_at, max(of_ranks), max(of_workers, default=0))


def _look(process: "subprocess.Popen[str]", peaks: dict[int, tuple[bool, int]]) -> None:
    """Note, until the launcher ends, whether each process is a rank, and its peak in bytes."""
    while process.poll() is None:
        # One may have just ended; its last look counts.
        with contextlib.suppress(psutil.NoSuchProcess, OSError, StopIteration):
            launcher = psutil.Process(process.pid)
            ranks = {child.pid for child in launcher.children()}
            for child in launcher.children(recursive=True):
                peak = status_bytes(f"/proc/{child.pid}/status", "VmHWM")
                peaks[child.pid] = child.pid in ranks, peak
        time.sleep(LOOK_S)


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
