"""Checkpoints: whole or not at all, onto any number of ranks and any stage, one life at a time."""

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_vse import checkpoint, distributed, fence
from dist_vse.checkpoint import Progress
from dist_vse.contrast import global_loss
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.zero import ZeroEngine
from dist_vse.errors import UserError
from dist_vse.grad_cache import train_step
from dist_vse.saver import Saver
from dist_vse.stream.order import ORDER_FORMAT
from tests.distributed import run_distributed
from tests.tiny import tiny_batch, tiny_model

B = 16
SOURCES = [(1, 0), (2, 2), (4, 3)]


def _engine(stage: int, name: str = "adamw") -> ZeroEngine:
    model = tiny_model()
    for parameter in model.image.trunk.parameters():
        parameter.requires_grad_(False)  # DeepSpeed's own export forgets frozen towers
    rows = B // distributed.world_size()
    optimizer = build_optimizer(
        model, name=name, lr=0.01, weight_decay=0.1, betas=(0.9, 0.999), momentum=0.9
    )
    return ZeroEngine(model, optimizer, stage=stage, rank_batch_size=rows)


def _step(engine: ZeroEngine, step: int) -> None:
    rank, rows = distributed.rank(), B // distributed.world_size()
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, step))
    chunk = engine.module.prepare(images=images, tokens=tokens)
    train_step(engine, lambda *features: global_loss("convse", *features).loss, [chunk])


def _parameters(engine: ZeroEngine) -> Tensor:
    with engine.whole_parameters():
        return torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])


def _saver(folder: Path, *, keep_last: int = 2, keep_best: int = 0, minutes: float = 0) -> Saver:
    held = fence.claim(folder) if distributed.is_main_process() else None
    held = distributed.broadcast_object(held)
    return Saver(folder, held, keep_last=keep_last, keep_best=keep_best, minutes=minutes)


def _whole_state(files: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join all ranks' pieces: `KEY/PARAMETER` with its elements in order."""
    runs: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for name, value in (item for file in files for item in file.items()):
        if name.startswith("optim/") and value.ndim:
            key, start = name.rsplit("/", 1)
            runs[key].append((int(start), value))
    whole = {}
    for key, found in runs.items():
        found.sort(key=lambda run: run[0])
        ends = [start + len(value) for start, value in found]
        assert [start for start, _ in found] == [0, *ends[:-1]], key  # no gap, nothing twice
        whole[key] = torch.cat([value for _, value in found])
    return whole


def _write_source(folder: Path, stage: int, name: str) -> Tensor:
    """Train two steps, save, train a third; return the parameters after it."""
    engine = _engine(stage, name)
    _step(engine, 0)
    _step(engine, 1)
    saver = _saver(folder)
    saver.start(engine, Progress(2, 2 * B, [[0, 0]]), score=None)
    saver.finish()
    _step(engine, 2)
    return _parameters(engine)


def _load_everywhere(folders: list[Path], name: str) -> dict[tuple[int, int], tuple[float, Tensor]]:
    """Load every source at every stage; return whether all came back, and a step's result."""
    results = {}
    for number, folder in enumerate(folders):
        for stage in (0, 1, 2, 3):
            engine = _engine(stage, name)
            assert checkpoint.load_latest(folder, engine) == Progress(2, 2 * B, [[0, 0]])
            path = checkpoint.latest(folder)
            assert path is not None
            files = checkpoint.rank_files(path, checkpoint.read_manifest(path)["world_size"])
            expected = _whole_state([load_file(file) for file in files])
            found = _whole_state(distributed.all_gather_object(engine.dump_optimizer()))
            same = expected.keys() == found.keys() and all(
                torch.equal(expected[key], found[key]) for key in expected
            )
            weights = load_file(path / checkpoint.WEIGHTS)
            with engine.whole_parameters():
                same &= all(
                    torch.equal(weights[k], v) for k, v in engine.module.state_dict().items()
                )
            assert len(expected) >= 10
            _step(engine, 2)
            results[number, stage] = (same, _parameters(engine))
    return results


def _forget_order(folder: Path) -> Progress | None:
    """Load a checkpoint of a version that had one order only."""
    _write_source(folder, 0, "sgd")
    path = checkpoint.latest(folder)
    assert path is not None
    manifest = checkpoint.read_manifest(path)
    assert manifest.pop("order") == ORDER_FORMAT
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    return checkpoint.load_latest(folder, _engine(0, "sgd"))


def test_a_checkpoint_keeps_the_format_of_its_order(tmp_path: Path) -> None:
    assert run_distributed(_forget_order, 1, tmp_path) == [Progress(2, 2 * B, [[0, 0]], order=1)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "sources"), [("adamw", SOURCES), ("sgd", SOURCES[:1])])
def test_any_world_size_and_stage_resume_from_any(
    tmp_path: Path, name: str, sources: list[tuple[int, int]]
) -> None:
    folders, expected = [], []
    for world_size, stage in sources:
        folders.append(tmp_path / f"{world_size}-{stage}")
        folders[-1].mkdir()
        expected.append(run_distributed(_write_source, world_size, folders[-1], stage, name)[0])
    start = torch.cat([p.flatten() for p in tiny_model().parameters()])
    for world_size in (1, 2, 4):
        (results, *_) = run_distributed(_load_everywhere, world_size, folders, name, timeout=200)
        for (number, stage), (same, parameters) in results.items():
            assert same, (sources[number], world_size, stage)
            error = (parameters - expected[number]).norm() / (expected[number] - start).norm()
            assert error < 1e-4, (sources[number], world_size, stage, error)


def _files(step: int) -> dict[str, dict[str, Tensor]]:
    """What two ranks would save at a step: every element tells the step."""
    value = torch.full((500_000,), float(step))
    return {
        checkpoint.WEIGHTS: {"a": value},
        "rank-0.safetensors": {"b": value},
        "rank-1.safetensors": {"c": value},
    }


def _publish(folder: Path, step: int) -> None:
    temporary = folder / f"step-{step:06d}.tmp"
    receipts = checkpoint.write_files(temporary, _files(step))
    checkpoint.seal(temporary, Progress(step, step, []), receipts)
    checkpoint.publish(temporary, folder / f"step-{step:06d}")


class _TellingEngine:
    """What a saver asks of an engine, quick to start; every number in it tells the step."""

    stage = 1

    def __init__(self) -> None:
        self.module = torch.nn.Linear(500, 500)

    def tell(self, step: int) -> None:
        self.step = step
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.fill_(step)

    def dump_optimizer(self) -> dict[str, Tensor]:
        return {"optim/a/0": torch.full((250_000,), float(self.step))}

    def whole_parameters(self) -> Any:
        return contextlib.nullcontext()

    def load(self, weights: dict[str, Tensor], files: Sequence[Path]) -> None:
        self.step = int(weights["bias"][0])


def _save_for_ever(folder: Path) -> None:
    """Save without end, as training does."""
    engine, saver = _TellingEngine(), _saver(folder)
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
        assert (manifest["samples_seen"], manifest["lanes"]) == (step * B, [[step, step]])
        names = {checkpoint.WEIGHTS, "rank-0.safetensors", "rank-1.safetensors"}
        assert set(manifest["files"]) == names
        for file in names:
            numbers = {k: v for k, v in load_file(newest / file).items() if v.is_floating_point()}
            assert numbers and all((v == step).all() for v in numbers.values()), (newest, file)
        unfinished += any(folder.glob("*.tmp"))
    assert unfinished >= 10  # most kills did hit a save


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("rank-1.safetensors", "flip", "rank-1.safetensors has changed since it was written"),
        ("rank-0.safetensors", "cut", "rank-0.safetensors is cut"),
        ("model.safetensors", "remove", "model.safetensors is missing"),
        ("manifest.json", "cut", "manifest.json is missing or cut"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, damage: str, fault: str
) -> None:
    for step in (1, 2):
        _publish(tmp_path, step)
    path = tmp_path / "step-000002" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.unlink()
    if damage != "remove":
        path.write_bytes(content[:-1] if damage == "cut" else content)
    assert checkpoint.find_fault(path.parent) == fault
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"


def _save_steps(folder: Path, *steps: int, keep_best: int = 0) -> None:
    """Save as one life of a run does, keeping two."""
    engine, saver = _TellingEngine(), _saver(folder, keep_best=keep_best)
    for step in steps:
        engine.tell(step)
        saver.start(engine, Progress(step, step, []), score=1.0 / step)  # type: ignore[arg-type]
        saver.finish()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _load(folder: Path) -> Progress | None:
    return checkpoint.load_latest(folder, _TellingEngine())  # type: ignore[arg-type]


def test_damaged_checkpoints_do_not_count_among_the_kept(tmp_path: Path) -> None:
    _save_steps(tmp_path, 1, 500)
    whole = tmp_path / "whole"
    (tmp_path / "step-000001").rename(whole)  # so that it outlives two later ones
    _save_steps(tmp_path, 600)
    whole.rename(tmp_path / "step-000001")
    for step in (500, 600):
        (tmp_path / f"step-000{step}" / "rank-0.safetensors").write_bytes(b"")
    assert _load(tmp_path) == Progress(1, 1, [])
    aside = ["step-000500.damaged", "step-000600.damaged"]
    assert _names(tmp_path) == ["step-000001", *aside]
    _save_steps(tmp_path, 100, 500)
    assert _names(tmp_path) == ["step-000100", "step-000500", *aside]
    assert _load(tmp_path) == Progress(500, 500, [])
    (tmp_path / "step-000500" / "rank-0.safetensors").write_bytes(b"")  # a second time
    assert _load(tmp_path) == Progress(100, 100, [])
    assert _names(tmp_path) == ["step-000100", *aside]


def test_checkpoints_of_which_none_is_whole_are_an_error_each_time(tmp_path: Path) -> None:
    assert _load(tmp_path) is None
    _save_steps(tmp_path, 1, 2)
    (tmp_path / "step-000001" / checkpoint.MANIFEST).unlink()
    (tmp_path / "step-000002" / "rank-0.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 2 .* \(step-000002: rank-0.* missing\)"):
            _load(tmp_path)
    assert _names(tmp_path) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("content", [None, '{"score": 1', "\xff"])
def test_a_checkpoint_whose_manifest_is_unreadable_has_no_score(
    tmp_path: Path, content: str | None
) -> None:
    _save_steps(tmp_path, 1, 2, 3, keep_best=2)
    manifest = tmp_path / "step-000001" / checkpoint.MANIFEST
    manifest.unlink() if content is None else manifest.write_text(content, encoding="latin-1")
    _save_steps(tmp_path, 4, keep_best=2)
    assert _names(tmp_path) == ["step-000002", "step-000003", "step-000004"]


def test_a_kill_while_a_checkpoint_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_killed(path: Path, **_: Any) -> None:
        (path / checkpoint.WEIGHTS).unlink()
        raise KeyboardInterrupt

    _save_steps(tmp_path, 1, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", be_killed)
        _save_steps(tmp_path, 3)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-000002", "step-000003"]
    _saver(tmp_path)  # the next life
    assert _names(tmp_path) == ["step-000002", "step-000003"]


def _save_scored(folder: Path) -> list[str]:
    saver, engine = _saver(folder, keep_last=1, keep_best=2), _engine(0)
    for step, score in enumerate([None, 5.0, 9.0, None, 7.0, 1.0, None]):
        saver.start(engine, Progress(step, step, []), score=score)
    saver.finish()
    return [path.name for path in checkpoint.steps(folder)]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    (kept,) = run_distributed(_save_scored, 1, tmp_path)
    assert kept == ["step-000002", "step-000004", "step-000006"]


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save({"a": Bomb()}, tmp_path / checkpoint.WEIGHTS)
    with pytest.raises(UserError, match="can't be read"):
        checkpoint.load_weights(tmp_path, tiny_model())
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    weights = {k: v.clone() for k, v in tiny_model().state_dict().items()}
    name = next(iter(weights))
    save_file({**weights, name: torch.ones(3)}, tmp_path / checkpoint.WEIGHTS)
    with pytest.raises(UserError, match=rf"doesn't fit the run's config \({name} is \(3,\)"):
        checkpoint.load_weights(tmp_path, tiny_model())


def _save_in_two_lives(folder: Path) -> tuple[str, list[str]]:
    """Return what the older life is told, and the checkpoints of both."""
    engine = _engine(0)
    orphan = _saver(folder)
    orphan.start(engine, Progress(1, 1, []), score=None)
    orphan.finish()
    later = _saver(folder)
    orphan.start(engine, Progress(2, 2, []), score=None)
    told = ""
    try:
        orphan.finish()
    except UserError as error:
        told = str(error)
    later.start(engine, Progress(3, 3, []), score=None)
    later.finish()
    return told, sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_an_older_life_can_not_save_any_more(tmp_path: Path) -> None:
    ((told, folders),) = run_distributed(_save_in_two_lives, 1, tmp_path)
    assert "a later start of this run has taken it over" in told
    assert folders == ["step-000001", "step-000003"]


def _lose_the_folder_to_a_later_life(folder: Path) -> tuple[str, bool]:
    """Return what a life is told whose files a later one removes, and whether it can tell why."""
    engine, saver, write_files = _engine(0), _saver(folder), checkpoint.write_files

    def slow_write(temporary: Path, files: Any) -> Any:
        temporary.mkdir()
        _saver(folder)  # removes the leftovers of all other lives
        (temporary / checkpoint.WEIGHTS).touch()

    checkpoint.write_files = slow_write
    saver.start(engine, Progress(1, 1, []), score=None)
    try:
        saver.finish()
    except UserError as error:
        return str(error), isinstance(error, fence.TakenOver)
    finally:
        checkpoint.write_files = write_files
    return "", False


def test_a_life_whose_files_a_later_one_removes_tells_that_it_was_taken_over(
    tmp_path: Path,
) -> None:
    ((told, taken_over),) = run_distributed(_lose_the_folder_to_a_later_life, 1, tmp_path)
    assert taken_over, told


def _train_while_files_are_written(folder: Path) -> list[bool]:
    """Hold the writing up and train on; return what is to be true."""
    engine, saver, gate = _engine(1), _saver(folder, minutes=1), threading.Event()
    write_files = checkpoint.write_files

    def slow_write(*args: Any) -> Any:
        assert gate.wait(30)
        return write_files(*args)

    checkpoint.write_files = slow_write
    _step(engine, 0)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    saver._last -= 61  # seconds
    true = [saver.overdue]
    saver.start(engine, Progress(1, B, []), score=None)
    true += [saver.writing, not saver.overdue]
    _step(engine, 1)
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
    """Return what a life is told that a later one replaces while its manifest is written."""
    engine, saver, seal = _engine(0), _saver(folder), checkpoint.seal

    def slow_seal(*args: Any, **more: Any) -> None:
        seal(*args, **more)
        fence.claim(folder)

    checkpoint.seal = slow_seal
    saver.start(engine, Progress(1, 1, []), score=None)
    try:
        saver.finish()
    except UserError as error:
        return str(error)
    finally:
        checkpoint.seal = seal
    return ""


def test_a_life_that_is_taken_over_while_it_saves_publishes_nothing(tmp_path: Path) -> None:
    (told,) = run_distributed(_be_taken_over_while_saving, 1, tmp_path)
    assert "a later start of this run has taken it over" in told
    assert not list(tmp_path.glob("step-*"))


def test_leftovers_of_other_lives_are_removed_and_nothing_else(tmp_path: Path) -> None:
    held = fence.claim(tmp_path)
    own, other = (f"step-000007.life-1-{token}.tmp" for token in (held.token, "0" * 16))
    for name in (own, other):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-1.safetensors").write_bytes(b"written by a faster rank")
    Saver(tmp_path, held, keep_last=2, keep_best=0, minutes=0)
    assert not (tmp_path / other).exists()
    assert (tmp_path / own / "rank-1.safetensors").is_file()


def _fill_the_disk(folder: Path) -> list[str]:
    """Save on a disk that is full for rank 1; return what this rank is told, and what is left."""
    saver = _saver(folder)
    engine = _engine(1)
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
        return [str(error), *(p.name for p in folder.iterdir() if p.is_dir())]
    finally:
        if distributed.rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return []


def test_a_rank_that_can_not_write_ends_all_with_one_message(tmp_path: Path) -> None:
    first, second = run_distributed(_fill_the_disk, 2, tmp_path)
    assert first[0] == second[0]
    assert "can't be written (" in first[0] and "(on rank 1)" in first[0]
    assert first[1:] == ["step-000001"]
