"""One real Slurm cluster of three nodes for all of these tests; skipped aloud where it can't be."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.datasets import write_dataset
from tests.slurm.cluster import SCRIPT, Cluster

NEEDED = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge iproute2"


def _obstacle() -> str | None:
    """Say why no cluster can be started here; None if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "NO SLURM TESTS: they need Linux and root, for network namespaces"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    return f"NO SLURM TESTS: {', '.join(missing)} missing; {INSTALL}" if missing else None


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    obstacle = _obstacle()
    if obstacle:
        terminalreporter.write_line(obstacle, red=True, bold=True)


@pytest.fixture(scope="session")
def started() -> Iterator[Cluster]:
    obstacle = _obstacle()
    if obstacle:
        pytest.skip(obstacle)
    subprocess.run([SCRIPT, "start", "3"], check=True, timeout=60)
    yield Cluster()
    subprocess.run([SCRIPT, "stop"], check=True, timeout=60)


@pytest.fixture
def cluster(started: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, with its commands on PATH; what a test leaves running is ended."""
    monkeypatch.setenv("PATH", f"{started.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield started
    started.clean()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm-data")
    write_dataset(folder, {"train": [200, 150, 100, 190], "val": [32]})
    return folder
