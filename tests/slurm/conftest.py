"""One real Slurm cluster of three nodes for all of these tests; skipped aloud where it can't be."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPT, Cluster, obstacle
from tests.support.datasets import write_dataset


@pytest.fixture(scope="session")
def started() -> Iterator[Cluster]:
    reason = obstacle()
    if reason:
        pytest.skip(reason)
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
