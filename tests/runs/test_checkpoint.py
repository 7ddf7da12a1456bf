"""Checkpoints: whole or not at all, onto any number of ranks and any stage."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.engine import RunEngine
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import Progress
from tests.support.distributed import run_distributed
from tests.support.engines import FSDP2
from tests.support.savers import (
    B,
    TellingEngine,
    build_engine,
    folder_names,
    open_saver,
    save_steps,
    take_step,
)
from tests.support.tiny import tiny_model

SOURCES = [(1, 0), (2, 2), (4, 3), (2, FSDP2 + 3)]


def _parameters(engine: RunEngine) -> Tensor:
    with engine.gathered_parameters() as model:
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


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
    engine = build_engine(stage, name)
    take_step(engine, 0)
    take_step(engine, 1)
    saver = open_saver(folder)
    saver.start(engine, Progress(2, 2 * B, [[0, 0]]), score=None)
    saver.finish()
    take_step(engine, 2)
    return _parameters(engine)


def _load_everywhere(folders: list[Path], name: str) -> dict[tuple[int, int], tuple[float, Tensor]]:
    """Load every source at every stage; return whether all came back, and a step's result."""
    results = {}
    for number, folder in enumerate(folders):
        for stage in (0, 1, 2, 3, FSDP2 + 3):
            engine = build_engine(stage, name)
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
            with engine.gathered_parameters() as model:
                same &= all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
            assert len(expected) >= 10
            take_step(engine, 2)
            results[number, stage] = (same, _parameters(engine))
    return results


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "sources", "world_sizes"),
    [
        ("adamw", SOURCES[1:2], (1,)),
        pytest.param("adamw", SOURCES, (1, 2, 4), marks=pytest.mark.slow),
        pytest.param("sgd", SOURCES[:1], (1, 2, 4), marks=pytest.mark.slow),
    ],
)
def test_any_world_size_and_stage_resume_from_any(
    tmp_path: Path, name: str, sources: list[tuple[int, int]], world_sizes: tuple[int, ...]
) -> None:
    folders, expected = [], []
    for world_size, stage in sources:
        folders.append(tmp_path / f"{world_size}-{stage}")
        folders[-1].mkdir()
        expected.append(run_distributed(_write_source, world_size, folders[-1], stage, name)[0])
    start = torch.cat([p.flatten() for p in tiny_model().parameters()])
    for world_size in world_sizes:
        (results, *_) = run_distributed(_load_everywhere, world_size, folders, name, timeout=200)
        for (number, stage), (same, parameters) in results.items():
            assert same, (sources[number], world_size, stage)
            error = (parameters - expected[number]).norm() / (expected[number] - start).norm()
            assert error < 1e-4, (sources[number], world_size, stage, error)


def _files(step: int) -> dict[str, dict[str, Tensor]]:
    """What two ranks would save at a step: every element is the step."""
    value = torch.full((500_000,), float(step))
    return {
        checkpoint.WEIGHTS: {"a": value},
        "rank-0.safetensors": {"b": value},
        "rank-1.safetensors": {"c": value},
    }


def _publish(folder: Path, step: int) -> None:
    temporary = folder / f"step-{step:06d}.tmp"
    receipts = checkpoint.write_files(temporary, _files(step))
    checkpoint.write_manifest(
        temporary, Progress(step, step, []), receipts, world_size=2, zero_stage=1
    )
    checkpoint.publish(temporary, folder / f"step-{step:06d}")


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("rank-1.safetensors", "flip", "rank-1.safetensors has changed since it was written"),
        ("rank-0.safetensors", "cut", "rank-0.safetensors is cut"),
        ("model.safetensors", "remove", "model.safetensors is missing"),
        ("manifest.json", "cut", "manifest.json is missing or damaged"),
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
    assert (checkpoint.find_fault(path.parent) or "").startswith(fault)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"


def _load(folder: Path) -> Progress | None:
    return checkpoint.load_latest(folder, TellingEngine())  # type: ignore[arg-type]


def test_other_ranks_draw_numbers_that_nobody_drew_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank's random state fits another world size: not those of the start are drawn again."""
    monkeypatch.setattr(checkpoint, "_read_weights", lambda path, module: {})
    monkeypatch.setattr(TellingEngine, "load", lambda *_: None, raising=False)
    seeds = {5}
    for step in (3, 4):
        _publish(tmp_path, step)  # by two ranks
        torch.manual_seed(5)
        assert _load(tmp_path) == Progress(step, step, [])
        seeds.add(torch.initial_seed())
    assert len(seeds) == 3


def test_damaged_checkpoints_do_not_count_among_the_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 500)
    whole = tmp_path / "whole"
    (tmp_path / "step-000001").rename(whole)  # so that it outlives two later ones
    save_steps(tmp_path, 600)
    whole.rename(tmp_path / "step-000001")
    for step in (500, 600):
        (tmp_path / f"step-000{step}" / "rank-0.safetensors").write_bytes(b"")
    assert _load(tmp_path) == Progress(1, 1, [])
    aside = ["step-000500.damaged", "step-000600.damaged"]
    assert folder_names(tmp_path) == ["step-000001", *aside]
    save_steps(tmp_path, 100, 500)
    assert folder_names(tmp_path) == ["step-000100", "step-000500", *aside]
    assert _load(tmp_path) == Progress(500, 500, [])
    (tmp_path / "step-000500" / "rank-0.safetensors").write_bytes(b"")  # a second time
    assert _load(tmp_path) == Progress(100, 100, [])
    assert folder_names(tmp_path) == ["step-000100", *aside]


def test_checkpoints_of_which_none_is_whole_are_an_error_each_time(tmp_path: Path) -> None:
    assert _load(tmp_path) is None
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step-000001" / checkpoint.MANIFEST).unlink()
    (tmp_path / "step-000002" / "rank-0.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 2 .* \(step-000002: rank-0.* missing\)"):
            _load(tmp_path)
    assert folder_names(tmp_path) == ["step-000001", "step-000002"]


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
