"""`dist-vse bench peers`: its options, its searches, and small trainings of both sides."""

import re
import sys
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.support import run_training as running
from benchmarks.support.max_batch import largest_batch
from benchmarks.support.model_size import model_sizes
from benchmarks.support.run_training import TrainingRun, run_training
from benchmarks.support.step_errors import step_errors
from benchmarks.support.trainer_data import CONTEXT, Model, write_data, write_words
from benchmarks.support.trainers import (
    OUR_STEP,
    OURS,
    PEER,
    PEER_STEP,
    STREAMS,
    Setting,
    Task,
    train,
)
from dist_vse.common.errors import UserError
from dist_vse.models.tokenizer import WordTokenizer
from dist_vse.tools.verify.peer import peer_version
from tests.support.distributed import run_distributed

needs_peer = pytest.mark.skipif(peer_version() is None, reason="needs open_clip_torch")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("trainers") / "data"
    model = Model("test_vit", 32, text_width=64, text_depth=1, dim=16)
    write_data(folder, model, 24)
    return Setting(folder, model, processes=1, workers=0, timeout_s=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "100"], r"--batch \(100\) must be a multiple of .* = 128"),
        (["--steps", "0"], r"--steps \(0\) must be at least 1"),
        (["--warm-up", "0"], r"--warm-up \(0\) must be at least 1"),
        (["--rounds", "-1"], r"--rounds \(-1\) must be at least 0"),
        (["--workers", "3"], r"--processes times --workers \(6\) must divide 8"),
        (["--photographs", "9"], r"--photographs \(9\) must be a multiple of 8"),
        (["--text-width", "100"], r"--text-width \(100\) must be a multiple of 64"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["peers", *arguments]) == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


def test_steps_of_both_logs_are_found_and_nothing_else() -> None:
    ours = "12:00:00 step  3/10  loss 4.1  batch R@1 2.0 %"
    peer = "2026-11-24,12:00:00 | INFO | Train Epoch: 0 [ 256/1792 (14%)] Data (t): 0.1"
    others = [
        "step 0, train: image to text R@1 3.1 %",
        "| INFO | Start epoch 0",
        "stopped at step 4",
    ]
    assert OUR_STEP.search(ours) and PEER_STEP.search(peer)
    assert not any(p.search(line) for p in (OUR_STEP, PEER_STEP) for line in others)


@pytest.mark.parametrize("limit", [100, 1000, 5000])
def test_the_largest_batch_is_found_on_a_curve(limit: int) -> None:
    def peak(batch: int) -> int:
        return 80 + batch + batch * batch // 10_000

    found = largest_batch(peak, limit=limit, first=64, unit=8)
    assert found is not None and found.peak_bytes == peak(found.batch) <= limit
    assert found.peak_bytes >= 0.97 * limit or peak(found.batch + 8) > limit
    assert len(found.tries) <= 6


def test_the_search_ends_at_its_bound_and_where_nothing_fits() -> None:
    found = largest_batch(lambda batch: batch, limit=10_000, first=64, unit=8, max_batch=128)
    assert found is not None
    assert found.tries == {64: 64, 128: 128} and found.by_line == 10_000
    assert largest_batch(lambda batch: 100, limit=10, first=64, unit=8) is None


def test_a_trainings_end_is_no_failure(tmp_path: Path) -> None:
    def run(program: str, timeout_s: float = 30.0) -> TrainingRun:
        return run_training(
            [sys.executable, "-c", program],
            re.compile("^step"),
            steps=2,
            cwd=tmp_path,
            environment={},
            timeout_s=timeout_s,
        )

    with pytest.raises(UserError, match=r"exit code 3, 1 of 2 steps in 30.0 s\n(.*\n)*step"):
        run("print('step', flush=True); exit(3)")
    with pytest.raises(UserError, match="exit code 0, 0 of 2 steps"):
        run("print('nothing')")
    with pytest.raises(UserError, match=r"exit code -9, 0 of 2 steps in 0\.2 s"):
        run("import time; time.sleep(60)", 0.2)


@pytest.mark.timeout(60)
def test_a_training_is_ended_with_its_ranks_once_it_has_taken_its_steps(tmp_path: Path) -> None:
    rank = "print('step\\n' * 3, flush=True); import time; time.sleep(600)"
    launcher = (
        "import subprocess, sys\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True)\n"
        "open('pid', 'w').write(str(rank.pid))\n"
        "rank.wait()"
    )
    command = [sys.executable, "-c", launcher]
    step = re.compile("^step")
    training = run_training(command, step, steps=2, cwd=tmp_path, environment={}, timeout_s=50.0)
    assert len(training.step_at) == 2 and training.rank_bytes > 0
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("young_s", "counts"), [(0.0, True), (600.0, False)])
def test_a_child_of_a_rank_counts_once_it_is_no_copy_about_to_run_a_command(
    young_s: float, counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "YOUNG_S", young_s)
    rank = "import os, time; os.fork() and print('step', flush=True); time.sleep(600)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    command = [sys.executable, "-c", launcher]
    step = re.compile("^step")
    training = run_training(command, step, steps=1, cwd=tmp_path, environment={}, timeout_s=50.0)
    assert training.rank_bytes > 0 and (training.worker_bytes > 0) == counts


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ours_trains_and_is_measured(setting: Setting) -> None:
    # More pairs than there are samples, as the search for the largest batch has.
    training = train(setting, Task(OURS, 4 * STREAMS, 2, 3))
    assert len(training.step_at) == 3
    assert 0 < training.seconds_a_step(1) < 100
    assert training.rank_bytes > 200 * 2**20  # a process with torch in it
    assert training.worker_bytes < 100 * 2**20  # no data worker


@needs_peer
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_open_clips_own_main_trains_and_is_measured(setting: Setting) -> None:
    training = train(setting, Task(PEER, 4 * STREAMS, 2, 3))
    assert len(training.step_at) == 3
    assert training.rank_bytes > 200 * 2**20


@needs_peer
def test_the_models_differ_by_nothing_that_costs(setting: Setting) -> None:
    sizes = model_sizes(setting)
    assert sizes[OURS] == sizes[PEER]


@needs_peer
def test_both_sides_have_the_same_tokens(tmp_path: Path) -> None:
    from open_clip.tokenizer import HFTokenizer

    ours = WordTokenizer(["a", "cat", "don't", "café", "—", "'"], CONTEXT)
    write_words(tmp_path / "words", ours)
    theirs = HFTokenizer(str(tmp_path / "words"), CONTEXT)
    for caption in ("A  cat", "Don't — CAFÉ 'dog'", "cat " * 40):
        row = ours([caption])[0]
        assert torch.equal(theirs(caption)[0, : len(row)], row)
        assert not theirs(caption)[0, len(row) :].any()


@needs_peer
@pytest.mark.slow
def test_the_gradients_errors_are_reported() -> None:
    for errors in run_distributed(step_errors, 2, 4):
        for name, parts in errors.items():
            wrong = name == "OpenCLIP 4"  # its temperature's gradient is K times too large
            assert parts["towers"]["error"] < 1e-5
            assert parts["temperature"]["factor"] == pytest.approx(4 if wrong else 1, abs=1e-4)
