"""Settings that must stand before torch or DeepSpeed is imported."""

import multiprocessing
import os
import signal

import pytest

from tests.slurm.cluster import obstacle

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A background shell starts its commands deaf to Ctrl-C; the tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ranks are forked from one server that has paid for the imports already.
multiprocessing.set_forkserver_preload(
    ["torch._inductor.compile_fx", "deepspeed", "deepspeed.runtime.zero.stage3", "timm"]
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup` the Slurm tests, which mostly wait, run beside all others."""
    for item in items:
        slurm = item.path.parent.name == "slurm"
        item.add_marker(pytest.mark.xdist_group("slurm" if slurm else "others"))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud that the Slurm tests were skipped."""
    reason = obstacle()
    if reason:
        terminalreporter.write_line(reason, red=True, bold=True)
