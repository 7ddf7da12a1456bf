"""What `dist-vse bench order` counts is counted right."""

from pathlib import Path

import pytest

from benchmarks.order import count_ours, worker_memory
from dist_vse.data.index import Index
from tests.support.datasets import write_dataset


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    sizes = [300 + 211 * n % 401 for n in range(3)]
    return write_dataset(tmp_path_factory.mktemp("data"), {"train": sizes}, size=8, captions=1)


def test_ours_misses_and_repeats_nothing_in_one_order(index: Index) -> None:
    alone, four = count_ours(index, 1, 0), count_ours(index, 4, 0)
    assert alone == four
    assert alone[:2] == (0, 0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_workers_memory_stays_as_it_is(index: Index) -> None:
    memory = worker_memory(index, 24_000)
    assert max(memory[5:]) < memory[4] * 1.02
