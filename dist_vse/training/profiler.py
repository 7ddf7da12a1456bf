"""A trace of a few steps, for chrome://tracing or https://ui.perfetto.dev: `profile=true`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from dist_vse import distributed
from dist_vse.common import step_timer
from dist_vse.common.files import atomic_write
from dist_vse.common.log import logger

BEFORE, TRACED = 3, 3
"""Steps that pass first (the last of them with the profiler warming up), and steps of the trace."""


class _Ranges:
    """Gives the trace a range for every part of a step."""

    def __init__(self) -> None:
        self._open: Any = None

    def begin(self, part: str) -> None:
        self.close()
        self._open = record_function(part)
        self._open.__enter__()

    def close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


@contextmanager
def profiled(path: Path | None) -> Iterator[Callable[[], None]]:
    """Trace steps of the block on rank 0, and write them to `path`; None traces nothing.

    Yields what must be called after every step.
    """
    if path is None or not distributed.is_main_process():
        yield lambda: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(trace: Any) -> None:
        with atomic_write(path) as temporary:
            trace.export_chrome_trace(str(temporary))
        logger.info("wrote %s: a trace of %d steps", path, TRACED)

    activities = [ProfilerActivity.CPU]
    if distributed.device().type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    ranges = _Ranges()
    steps = schedule(skip_first=BEFORE - 1, wait=0, warmup=1, active=TRACED, repeat=1)
    with (
        profile(activities=activities, schedule=steps, on_trace_ready=write) as trace,
        step_timer.listening(ranges),
    ):
        try:
            yield trace.step
        finally:
            ranges.close()
