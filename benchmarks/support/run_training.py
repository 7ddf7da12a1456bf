"""Starts a training in processes of its own; notes when its steps end and what memory it takes.

A step ends when its line of log arrives here, so the clock is the same for every trainer. Memory
is a process's largest resident set, as the kernel keeps it.
"""

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.support.memory import status_bytes
from dist_vse.common.errors import UserError

LOOK_S = 0.1  # between two looks at the memory
YOUNG_S = 1.0  # of age; a rank's child that is younger may be a copy of it, about to run a command
END_S = 10.0  # at most, for killed processes to be gone
TAIL = 80  # lines of a failed training that are shown


@dataclass(frozen=True)
class TrainingRun:
    """A training that has taken its steps."""

    step_at: list[float]  # seconds on one clock; item k - 1 for step k
    rank_bytes: int  # the largest peak of any rank
    worker_bytes: int  # and of any process that a rank started; 0 without one

    def seconds_a_step(self, warm_up: int) -> float:
        """Return the mean over the steps after the first `warm_up`."""
        return (self.step_at[-1] - self.step_at[warm_up - 1]) / (len(self.step_at) - warm_up)


def run_training(
    command: Sequence[str],
    step: re.Pattern[str],
    *,
    steps: int,
    cwd: Path,
    environment: Mapping[str, str],
    timeout_s: float,
) -> TrainingRun:
    """Run a launcher's command until it has taken `steps`; lines that `step` matches are these.

    What it would do after them is cut off.

    Raises UserError, with the end of its log, if it ends before or takes too long.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    late = threading.Timer(timeout_s, _end, [process.pid])
    peaks: dict[int, tuple[bool, int]] = {}
    looker = threading.Thread(target=_keep_looking, args=(process, peaks), daemon=True)
    late.start()
    looker.start()
    lines, step_at = [], []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if step.search(line):
                step_at.append(time.perf_counter())
            if len(step_at) == steps:
                _look(process, peaks)
                break
    finally:
        late.cancel()
        _end(process.pid)
        process.wait()
    looker.join()
    if len(step_at) < steps:
        code = f"exit code {process.returncode}, {len(step_at)} of {steps} steps in {timeout_s} s"
        raise UserError(f"{' '.join(command)}: {code}\n{''.join(lines[-TAIL:])}")
    of_ranks = [peak for is_rank, peak in peaks.values() if is_rank]
    of_workers = [peak for is_rank, peak in peaks.values() if not is_rank]
    return TrainingRun(step_at, max(of_ranks), max(of_workers, default=0))


def _keep_looking(process: "subprocess.Popen[str]", peaks: dict[int, tuple[bool, int]]) -> None:
    """Look until the launcher ends."""
    while process.poll() is None:
        _look(process, peaks)
        time.sleep(LOOK_S)


def _look(process: "subprocess.Popen[str]", peaks: dict[int, tuple[bool, int]]) -> None:
    """Note whether each process under the launcher is a rank, and its peak in bytes."""
    # One may have just ended; its last look counts.
    with contextlib.suppress(psutil.NoSuchProcess, OSError, StopIteration):
        launcher = psutil.Process(process.pid)
        ranks = {child.pid for child in launcher.children()}
        for child in launcher.children(recursive=True):
            if child.pid not in ranks and time.time() - child.create_time() < YOUNG_S:
                continue
            peak = status_bytes(f"/proc/{child.pid}/status", "VmHWM")
            peaks[child.pid] = child.pid in ranks, peak


def _end(launcher_pid: int) -> None:
    """Kill the launcher and all under it, whose ranks have sessions of their own.

    Python's trackers of shared memory stay: they tidy up, and end by themselves.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(launcher_pid)
        below = [p for p in launcher.children(recursive=True) if not _tidies_up(p)]
        for process in (launcher, *below):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=END_S)  # for the launcher, its `Popen` waits


def _tidies_up(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("resource_tracker" in word for word in process.cmdline())
    return True  # gone
