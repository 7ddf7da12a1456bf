"""A process that stands still ends by itself; one that works, however slowly, does not."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dist_vse.distributed import watchdog
from tests.support.datasets import write_dataset
from tests.support.paths import ROOT

PROGRAM = """
import os, sys
from dist_vse import train

def hang(*_):
    os.read(os.pipe()[0], 1)
    yield

train.build_train_batches = hang
sys.exit(train.main(sys.argv[1:]))
"""


class _Ended(Exception):  # noqa: N818
    pass


class _Looks:
    """An event that is waited for: something happens before every look."""

    def __init__(self, actions: Sequence[Callable[[], object]]) -> None:
        self.actions, self.count = actions, 0

    def wait(self, _: float) -> bool:
        if self.count == len(self.actions):
            return True
        self.actions[self.count]()
        self.count += 1
        return False


def _looks_until_the_end(
    monkeypatch: pytest.MonkeyPatch, actions: Sequence[Callable[[], object]]
) -> int:
    """Watch while the actions happen; return how many looks there were."""

    def end(code: int) -> None:
        assert code == 1
        raise _Ended

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(os, "write", lambda *_: None)
    looks = _Looks(actions)
    try:
        watchdog._watch(2.0, looks)  # type: ignore[arg-type]
    except _Ended:
        return looks.count
    return -1


def _nothing() -> None:
    pass


def test_only_standing_still_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    still = [_nothing] * 19
    watchdog.progress()
    assert _looks_until_the_end(monkeypatch, still) == -1
    assert _looks_until_the_end(monkeypatch, [_nothing, *still]) == 20
    slow = [watchdog.progress, *still, watchdog.progress, *still]
    assert _looks_until_the_end(monkeypatch, slow) == -1
    assert _looks_until_the_end(monkeypatch, [*slow, _nothing, _nothing]) == 41
    batches = watchdog.each([1, 2])
    read = lambda: next(batches, None)  # noqa: E731
    scores = [read, *still, read, *still, read, *still, *still, watchdog.progress]
    assert _looks_until_the_end(monkeypatch, scores) == -1
    batches = watchdog.each([1, 2])
    assert _looks_until_the_end(monkeypatch, [read, *still, read, *still, _nothing]) == 41
    batches = watchdog.each([])
    again = [read, *still, *still, watchdog.progress, *still, _nothing]
    assert _looks_until_the_end(monkeypatch, again) == len(again)


@pytest.mark.slow
def test_a_run_whose_data_never_comes_ends_with_one_line(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train": [64], "val": [8]})
    settings = (f"data.index={tmp_path}", f"output_dir={tmp_path / 'run'}")
    command = [sys.executable, "-c", PROGRAM, "configs/debug_cpu.yaml", *settings]
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    environment |= {"DS_ACCELERATOR": "cpu", "DIST_VSE_HANG_S": "2"}
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert time.monotonic() - began > 2
    assert done.returncode == 1, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told.startswith("error: rank 0 on ")
    assert "no step for 2 s (DIST_VSE_HANG_S); it hangs at " in told
    assert f"{ROOT / 'dist_vse' / 'train.py'}:" in told
