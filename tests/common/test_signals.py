"""Signals ask for a stop; a second Ctrl-C doesn't ask."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import signal
from dist_vse.common import signals
signals.listen()
for name in {names}:
    signal.raise_signal(getattr(signal, name))
    assert signals.asked()
print("lives", flush=True)
"""


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["SIGINT"], 0),
        (["SIGUSR1", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGTERM", "SIGINT"], 0),
        (["SIGINT", "SIGTERM", "SIGINT"], -signal.SIGINT),
    ],
)
def test_only_a_second_ctrl_c_ends_the_process(names: list[str], code: int) -> None:
    command = [sys.executable, "-c", PROGRAM.format(names=names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "lives\n" if code == 0 else ""), done.stderr
