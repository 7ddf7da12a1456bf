"""Settings that must stand before torch or DeepSpeed is imported."""

import multiprocessing
import os
import signal
from typing import Any

import pytest

from tests.slurm.cluster import obstacle

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The fused kernels run in Triton's interpreter, which must be asked for before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A background shell starts its commands deaf to Ctrl-C; the tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ranks are forked from one server that has paid for the imports already.
multiprocessing.set_forkserver_preload(
    ["torch._inductor.compile_fx", "deepspeed", "deepspeed.runtime.zero.stage3", "timm"]
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`, give each file to whichever process is free, and all Slurm tests to one.

    They share one cluster, and mostly wait.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if "/slurm/" in nodeid else nodeid.split("::", 1)[0]

    return OneCluster(config, log)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud that the Slurm tests were skipped."""
    reason = obstacle()
    if reason:
        terminalreporter.write_line(reason, red=True, bold=True)
