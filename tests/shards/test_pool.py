"""The pool keeps the order, and its processes end with whoever started them."""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.shards.pool import ordered_map


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    assert list(ordered_map(abs, list(range(-20, 0)), workers)) == list(range(20, 0, -1))


def test_an_early_end_drops_what_has_not_begun(tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(500)]
    with closing(ordered_map(os.mkdir, folders, 2)) as made:
        next(made)
    assert 1 <= len(list(tmp_path.iterdir())) < 500


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(UserError, match=r"killed, .* fewer --workers \(now 2\)"):
        list(ordered_map(os._exit, [1, 1], 2))


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """The workers hold the write end of a pipe: it closes when the last of them is gone."""
    fifos = [tmp_path / "a", tmp_path / "b"]
    for fifo in fifos:
        os.mkfifo(fifo)
    code = (
        "import sys; from pathlib import Path; from dist_vse.shards.pool import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    list(ordered_map(Path.read_bytes, [Path(a) for a in sys.argv[1:]], 2))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, fifos)], stderr=subprocess.PIPE
    )
    pipes = [os.open(fifo, os.O_WRONLY) for fifo in fifos]  # both workers are reading now
    process.kill()
    process.communicate()  # stderr ends when its last holder, a worker, has ended
    for pipe in pipes:
        with pytest.raises(BrokenPipeError):
            os.write(pipe, b"x")
        os.close(pipe)
