"""Two ranks killed at any moment while they save: the last checkpoint is whole."""

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dist_vse import distributed
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import Progress
from tests.support.distributed import run_distributed
from tests.support.savers import B, TellingEngine, open_saver

pytestmark = pytest.mark.slow


def _save_for_ever(folder: Path) -> None:
    """Save without end, as training does."""
    engine, saver = TellingEngine(), open_saver(folder)
    (folder / f"process-{distributed.rank()}").write_text(str(os.getpid()))
    for step in range(1, 10**6):
        engine.tell(step)
        saver.start(engine, Progress(step, step * B, [[step, step]]), score=None)  # type: ignore[arg-type]
        saver.settle(writing=distributed.any_rank(saver.writing))


def _kill_while_saving(folder: Path, rng: random.Random) -> None:
    """Kill both ranks at a random moment, one a little after the other."""
    with ThreadPoolExecutor(1) as threads:
        ranks = threads.submit(run_distributed, _save_for_ever, 2, folder)
        while not (folder / "step-000002").exists():  # two are good: now any moment will do
            assert not ranks.done(), ranks.exception()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.06))
        for rank in rng.sample((0, 1), 2):
            os.kill(int((folder / f"process-{rank}").read_text()), signal.SIGKILL)
            time.sleep(rng.choice((0, 0.005)))
        assert ranks.exception() is not None


@pytest.mark.timeout(300)
def test_thirty_kills_of_two_ranks_while_saving_leave_a_good_checkpoint(tmp_path: Path) -> None:
    rng, unfinished = random.Random(0), 0
    for number in range(30):
        folder = tmp_path / str(number)
        folder.mkdir()
        _kill_while_saving(folder, rng)
        newest = checkpoint.latest(folder)
        assert newest is not None and newest == checkpoint.steps(folder)[-1]
        manifest = checkpoint.read_manifest(newest)
        step = manifest["step"]
        assert step >= 2 and newest.name == f"step-{step:06d}"
        assert (manifest["samples_seen"], manifest["streams"]) == (step * B, [[step, step]])
        names = {checkpoint.WEIGHTS, "rank-0.safetensors", "rank-1.safetensors"}
        assert set(manifest["files"]) == names
        for file in names:
            numbers = {k: v for k, v in load_file(newest / file).items() if v.is_floating_point()}
            assert numbers and all((v == step).all() for v in numbers.values()), (newest, file)
        unfinished += any(folder.glob("*.tmp"))
    assert unfinished >= 10  # most kills did hit a save
