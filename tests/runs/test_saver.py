"""Saving in the background: what is kept, one attempt at a time, one error on all ranks."""

import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.runs import checkpoint, lease
from dist_vse.runs.checkpoint import Progress
from dist_vse.runs.saver import Saver
from tests.support.distributed import run_distributed
from tests.support.savers import B, build_engine, folder_names, open_saver, save_steps, take_step


@pytest.mark.parametrize("content", [None, '{"score": 1', "\xff"])
def test_a_checkpoint_whose_manifest_is_unreadable_has_no_score(
    tmp_path: Path, content: str | None
) -> None:
    save_steps(tmp_path, 1, 2, 3, keep_best=2)
    manifest = tmp_path / "step-000001" / checkpoint.MANIFEST
    manifest.unlink() if content is None else manifest.write_text(content, encoding="latin-1")
    save_steps(tmp_path, 4, keep_best=2)
    assert folder_names(tmp_path) == ["step-000002", "step-000003", "step-000004"]


def test_a_kill_while_a_checkpoint_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_killed(path: Path, **_: Any) -> None:
        (path / checkpoint.WEIGHTS).unlink()
        raise KeyboardInterrupt

    save_steps(tmp_path, 1, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", be_killed)
        save_steps(tmp_path, 3)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-000002", "step-000003"]
    open_saver(tmp_path)  # the next attempt
    assert folder_names(tmp_path) == ["step-000002", "step-000003"]


def _save_scored(folder: Path) -> list[str]:
    saver, engine = open_saver(folder, keep_last=1, keep_best=2), build_engine(0)
    for step, score in enumerate([None, 5.0, 9.0, None, 7.0, 1.0, None]):
        saver.start(engine, Progress(step, step, []), score=score)
    saver.finish()
    return [path.name for path in checkpoint.steps(folder)]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    (kept,) = run_distributed(_save_scored, 1, tmp_path)
    assert kept == ["step-000002", "step-000004", "step-000006"]


def _save_in_two_attempts(folder: Path) -> tuple[str, list[str]]:
    """Return what the older attempt is told, and the checkpoints of both."""
    engine = build_engine(0)
    orphan = open_saver(folder)
    orphan.start(engine, Progress(1, 1, []), score=None)
    orphan.finish()
    later = open_saver(folder)
    orphan.start(engine, Progress(2, 2, []), score=None)
    told = ""
    try:
        orphan.finish()
    except UserError as error:
        told = str(error)
    later.start(engine, Progress(3, 3, []), score=None)
    later.finish()
    return told, folder_names(folder)


def test_an_older_attempt_can_not_save_any_more(tmp_path: Path) -> None:
    ((told, folders),) = run_distributed(_save_in_two_attempts, 1, tmp_path)
    assert "a later attempt of this run has taken it over" in told
    assert folders == ["step-000001", "step-000003"]


def _lose_the_folder_to_a_later_attempt(folder: Path) -> tuple[str, bool]:
    """Return the error of an attempt whose files a later one removes, and whether it says why."""
    engine, saver, write_files = build_engine(0), open_saver(folder), checkpoint.write_files

    def slow_write(temporary: Path, files: Any) -> Any:
        temporary.mkdir()
        open_saver(folder)  # removes the leftovers of all other attempts
        (temporary / checkpoint.WEIGHTS).touch()

    checkpoint.write_files = slow_write
    saver.start(engine, Progress(1, 1, []), score=None)
    try:
        saver.finish()
    except UserError as error:
        return str(error), isinstance(error, lease.LostLease)
    finally:
        checkpoint.write_files = write_files
    return "", False


def test_an_attempt_whose_files_a_later_one_removes_says_that_it_was_taken_over(
    tmp_path: Path,
) -> None:
    ((told, taken_over),) = run_distributed(_lose_the_folder_to_a_later_attempt, 1, tmp_path)
    assert taken_over, told


def _train_while_files_are_written(folder: Path) -> list[bool]:
    """Hold the writing up and train on; return what is to be true."""
    engine, saver, gate = build_engine(1), open_saver(folder, minutes=1), threading.Event()
    write_files = checkpoint.write_files

    def slow_write(*args: Any) -> Any:
        assert gate.wait(30)
        return write_files(*args)

    checkpoint.write_files = slow_write
    take_step(engine, 0)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    saver._last -= 61  # seconds
    true = [saver.overdue]
    saver.start(engine, Progress(1, B, []), score=None)
    true += [saver.writing, not saver.overdue]
    take_step(engine, 1)
    saver.settle(writing=saver.writing)
    true.append(not checkpoint.steps(folder))
    gate.set()
    while saver.writing:
        time.sleep(0.001)
    saver.settle(writing=saver.writing)
    saved = load_file(folder / "step-000001" / checkpoint.WEIGHTS)
    after = engine.module.state_dict()
    true.append(all(torch.equal(saved[name], value) for name, value in before.items()))
    true.append(any(not torch.equal(saved[name], value) for name, value in after.items()))
    checkpoint.write_files = write_files
    return true


def test_training_goes_on_while_the_files_of_a_checkpoint_are_written(tmp_path: Path) -> None:
    assert run_distributed(_train_while_files_are_written, 1, tmp_path) == [[True] * 6]


def _be_taken_over_while_saving(folder: Path) -> str:
    """Return the error of an attempt that a later one replaces while it writes its manifest."""
    engine, saver, write = build_engine(0), open_saver(folder), checkpoint.write_manifest

    def slow_write(*args: Any, **more: Any) -> None:
        write(*args, **more)
        lease.acquire(folder)

    checkpoint.write_manifest = slow_write
    saver.start(engine, Progress(1, 1, []), score=None)
    try:
        saver.finish()
    except UserError as error:
        return str(error)
    finally:
        checkpoint.write_manifest = write
    return ""


def test_an_attempt_that_is_taken_over_while_it_saves_publishes_nothing(tmp_path: Path) -> None:
    (told,) = run_distributed(_be_taken_over_while_saving, 1, tmp_path)
    assert "a later attempt of this run has taken it over" in told
    assert not list(tmp_path.glob("step-*"))


def test_leftovers_of_other_attempts_are_removed_and_nothing_else(tmp_path: Path) -> None:
    held = lease.acquire(tmp_path)
    own, other = (f"step-000007.attempt-1-{token}.tmp" for token in (held.token, "0" * 16))
    for name in (own, other):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-1.safetensors").write_bytes(b"written by a faster rank")
    Saver(tmp_path, held, keep_last=2, keep_best=0, minutes=0)
    assert not (tmp_path / other).exists()
    assert (tmp_path / own / "rank-1.safetensors").is_file()


def _fill_the_disk(folder: Path) -> list[str]:
    """Save on a disk that is full for rank 1; return what this rank is told, and what is left."""
    saver = open_saver(folder)
    engine = build_engine(1)
    saver.start(engine, Progress(1, 1, []), score=None)
    saver.finish()
    if distributed.rank() == 1:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    saver.start(engine, Progress(2, 2, []), score=None)
    try:
        saver.finish()
    except UserError as error:
        return [str(error), *folder_names(folder)]
    finally:
        if distributed.rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return []


def test_a_rank_that_can_not_write_ends_all_with_one_message(tmp_path: Path) -> None:
    first, second = run_distributed(_fill_the_disk, 2, tmp_path)
    assert first[0] == second[0]
    assert "can't be written (" in first[0] and "(on rank 1)" in first[0]
    assert first[1:] == ["step-000001"]
