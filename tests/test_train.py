"""Whole runs on tiny real data: equal on any world size, resumed to the bit, one verdict."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_vse import distributed, train
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.evaluation.command import eval_run
from dist_vse.runs import checkpoint, lease
from dist_vse.runs.environment import read_environment
from dist_vse.runs.trained import open_trained
from tests.support.datasets import Sample, make_sample, write_dataset, write_shards
from tests.support.distributed import run_distributed
from tests.support.runs import CONFIG, read_lines, read_logged, read_losses, run, settings

SGD = ("optim.name=sgd", "optim.lr=0.05")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_dataset(folder, {"train": [60, 50, 40], "val": [32]})
    return folder


def _overrides(shards: Path, run_dir: Path, *more: str) -> list[str]:
    return settings(shards, run_dir, "total_steps=6", "log_every=1", *more)


def _run(overrides: list[str], signal_after: int | None = None) -> int | str:
    """Train on this rank; the last rank gets a signal once `signal_after` steps are logged."""
    if signal_after is not None and distributed.rank() == distributed.world_size() - 1:
        metrics = Path(load_config(CONFIG, overrides).output_dir) / "metrics.jsonl"
        threading.Thread(target=_signal_after, args=(metrics, signal_after), daemon=True).start()
    return run(overrides)


def _signal_after(metrics: Path, step: int) -> None:
    while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
        pass
    os.kill(os.getpid(), signal.SIGUSR1)


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.steps(run_dir / "checkpoints")[-1]
    return load_file(newest / "model.safetensors")


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["convse", pytest.param("convse++", marks=pytest.mark.slow)])
def test_the_loss_curve_does_not_depend_on_the_world_size(
    shards: Path, tmp_path: Path, loss: str
) -> None:
    curves, masked = [], []
    for world_size, stage in ((1, 0), (2, 2), (4, 1)):
        run_dir = tmp_path / f"w{world_size}"
        stage_override = f"engine.zero_stage={stage}"
        overrides = _overrides(shards, run_dir, *SGD, f"loss.name={loss}", stage_override)
        assert run_distributed(_run, world_size, overrides) == [0] * world_size
        curves.append(read_losses(run_dir))
        masked.append(read_logged(run_dir, "masked_pairs"))
    assert len(curves[0]) == 6
    environment = read_environment(tmp_path / "w2") or {}
    tiled = {"name": loss, "kernels": "tiled", "reason": "the device is cpu"}
    assert environment["loss"] == tiled
    assert masked[0] == masked[1] == masked[2]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_an_interrupted_run_continues_to_the_bit(shards: Path, tmp_path: Path, stage: int) -> None:
    # Dropout, Adam and a learned temperature: all of their state must come back.
    more = ("model.text.dropout=0.2", "loss.learn_temperature=true", f"engine.zero_stage={stage}")
    more = (*more, "eval_every=1")
    whole = _overrides(shards, tmp_path / "whole", *more)
    assert run_distributed(_run, 2, whole) == [0, 0]
    parts = _overrides(shards, tmp_path / "parts", *more)
    assert run_distributed(_run, 2, parts, 2) == [train.INTERRUPTED] * 2
    stopped_after = len(read_losses(tmp_path / "parts"))
    assert 2 <= stopped_after < 6
    evaluated = [line["step"] for line in read_lines(tmp_path / "parts") if line["kind"] == "eval"]
    assert evaluated == [*range(stopped_after)]  # the last step was saved at once
    assert run_distributed(_run, 2, parts) == [0, 0]
    assert read_losses(tmp_path / "parts") == read_losses(tmp_path / "whole")
    assert _same(_weights(tmp_path / "parts"), _weights(tmp_path / "whole"))


@pytest.mark.slow
def test_a_chunk_size_found_by_trying_is_written_down_and_changes_nothing(
    shards: Path, tmp_path: Path
) -> None:
    more = ("model.text.dropout=0.2", "checkpoint_every=3")
    auto = ("chunk_size=auto", "cache.keep_graphs=auto")
    found = _overrides(shards, tmp_path / "auto", *more, *auto, "cache.memory_gib=0.003")
    assert run_distributed(_run, 2, found) == [0, 0]
    chunk_size = load_config(tmp_path / "auto" / "config.yaml").chunk_size
    assert chunk_size in (4, 8)
    given = _overrides(shards, tmp_path / "given", *more, f"chunk_size={chunk_size}")
    assert run_distributed(_run, 2, given) == [0, 0]
    assert read_losses(tmp_path / "auto") == read_losses(tmp_path / "given")
    assert _same(_weights(tmp_path / "auto"), _weights(tmp_path / "given"))
    # A later attempt keeps it, whatever fits then or is the default where it runs.
    left_out = ("chunk_size=null", auto[1])
    later = _overrides(shards, tmp_path / "auto", *more, *left_out, "total_steps=8")
    assert run_distributed(_run, 2, later) == [0, 0]
    assert load_config(tmp_path / "auto" / "config.yaml").chunk_size == chunk_size
    assert len(read_losses(tmp_path / "auto")) == 8


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_in_fused_kernels_says_so_and_learns_the_same(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: the fused kernels are NOT tried")
    for kernels in ("fused", "tiled"):
        more = (*SGD, f"loss.kernels={kernels}", "total_steps=2")
        overrides = _overrides(shards, tmp_path / kernels, *more)
        assert run_distributed(_run, 1, overrides, timeout=110) == [0]
        environment = read_environment(tmp_path / kernels) or {}
        assert environment["loss"]["kernels"] == kernels
        assert environment["loss"]["reason"] == f"loss.kernels={kernels}"
    losses = read_losses(tmp_path / "fused")
    assert losses == pytest.approx(read_losses(tmp_path / "tiled"), abs=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_another_stage(shards: Path, tmp_path: Path) -> None:
    more = ("loss.learn_temperature=true", "checkpoint_samples=64", *SGD)
    assert run_distributed(_run, 1, _overrides(shards, tmp_path / "whole", *more)) == [0]
    assert _kept(tmp_path / "whole") == [4, 6]  # of 2, 4, 6
    parts = _overrides(shards, tmp_path / "parts", *more)
    for world_size, stage, steps in ((2, 3, 2), (4, 1, 4), (1, 2, 6)):
        overrides = [*parts, f"engine.zero_stage={stage}", f"total_steps={steps}"]
        assert run_distributed(_run, world_size, overrides) == [0] * world_size
    assert read_losses(tmp_path / "parts") == pytest.approx(
        read_losses(tmp_path / "whole"), abs=1e-5
    )


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.slow
def test_a_cut_checkpoint_is_passed_over_for_the_one_before(shards: Path, tmp_path: Path) -> None:
    overrides = _overrides(shards, tmp_path / "run", "checkpoint_every=2")
    assert run_distributed(_run, 1, overrides) == [0]
    weights = _weights(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoint.steps(folder)] == ["step-000004", "step-000006"]
    _cut(folder / "step-000006" / "rank-0.safetensors")
    assert run_distributed(_run, 1, overrides) == [0]
    assert (folder / "step-000006.damaged").is_dir()
    assert _same(_weights(tmp_path / "run"), weights)
    assert len(read_losses(tmp_path / "run")) == 6
    for path in checkpoint.steps(folder):
        _cut(path / "rank-0.safetensors")
    verdicts = run_distributed(_run, 2, overrides)
    assert verdicts[0] == verdicts[1]
    assert "none of the 2 checkpoints is whole" in verdicts[0]
    assert len(read_losses(tmp_path / "run")) == 6


def _kept(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_finished_run_is_left_alone(shards: Path, tmp_path: Path) -> None:
    overrides = _overrides(shards, tmp_path / "run", "checkpoint_minutes=1e-9")
    assert run_distributed(_run, 1, overrides) == [0]
    assert _kept(tmp_path / "run") == [5, 6]  # one was due at every step; two are kept
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run_distributed(_run, 1, overrides) == [0]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_every_rank_ends_with_the_same_error(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    cases: list[tuple[tuple[str, ...], str]] = [
        (("data.eval_split=tset",), "no split 'tset'"),
        (("global_batch_size=36",), "nearest: 32, 40"),
        (("data.index=nowhere",), "no such index"),
        (("model.image.name=test_vitt",), "did you mean"),
        (
            ("global_batch_size=512", "chunk_size=512"),
            "an epoch has 150 samples, fewer than global_batch_size",
        ),
    ]
    for overrides, message in cases:
        verdicts = run_distributed(_run, 2, _overrides(shards, run_dir, *overrides))
        assert verdicts[0] == verdicts[1]
        assert message in verdicts[0]


@pytest.mark.slow
def test_a_run_of_another_config_is_not_overwritten(shards: Path, tmp_path: Path) -> None:
    assert run_distributed(_run, 1, _overrides(shards, tmp_path / "run")) == [0]
    other = _overrides(shards, tmp_path / "run", "loss.name=convse++")
    (verdict,) = run_distributed(_run, 1, other)
    assert "holds a run of another config (loss.name: convse -> convse++)" in verdict
    (verdict,) = run_distributed(
        _run, 1, _overrides(shards, tmp_path / "run", "total_steps=7", "loss.kernels=tiled")
    )
    assert verdict == 0


def test_a_shard_that_vanishes_ends_every_rank(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_dataset(folder, {"train": [60, 50, 40], "val": [32]})
    (folder / "train-00001.tar").unlink()
    overrides = _overrides(folder, tmp_path / "run", "model.text.kind=gru")
    verdicts = run_distributed(_run, 2, overrides)
    assert all("train-00001.tar" in str(verdict) for verdict in verdicts)


@pytest.mark.slow
def test_a_mixture_with_bad_samples_trains_within_its_budget(tmp_path: Path) -> None:
    """Ranks in one log; another attempt goes on with it; too many bad samples end every rank."""
    folders = tmp_path / "a", tmp_path / "b"
    write_dataset(folders[0], {"train": [40, 30], "val": [8]})
    good = [make_sample(n) for n in range(30)]
    bad = [Sample(f"bad{n}", b"nothing", ("a",)) for n in range(2)]
    write_shards(folders[1], {"web": [[*good, *bad]]})
    mix = f"data.mix=[{{index: {folders[0]}}}, {{index: {folders[1]}, split: web, weight: 2}}]"
    overrides = _overrides(folders[0], tmp_path / "run", mix, "total_steps=10")
    verdicts = run_distributed(_run, 2, [*overrides, "data.max_bad=0.03"])  # 4 of 134 an epoch
    assert verdicts == [0, 0]
    skipped_log = tmp_path / "run" / "skipped.jsonl"
    lines = [json.loads(line) for line in skipped_log.read_text().splitlines()]
    assert {line["key"] for line in lines} == {"bad0", "bad1"}
    assert {line["shard"] for line in lines} == {"web-00000.tar"}
    assert sum(line["epoch"] == 0 for line in lines) == 4
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    verdicts = run_distributed(
        _run, 2, [*overrides, "data.max_bad=0.02", "total_steps=30", "log_every=5"]
    )
    assert verdicts[0] == verdicts[1]
    assert "bad samples so far, more than data.max_bad (0.02) of 134 allows (2)" in verdicts[0]
    assert str(skipped_log) in verdicts[0]


def _be_taken_over(overrides: list[str], during: str) -> tuple[type, str]:
    """Train, and let another start claim the run after the first call of a function of `train`."""
    config, original = load_config(CONFIG, overrides), getattr(train, during)

    def slow(*arguments: Any, **more: Any) -> Any:
        result = original(*arguments, **more)
        lease.acquire(Path(config.output_dir))
        return result

    setattr(train, during, slow)
    try:
        train.run(config)
    except UserError as error:
        return type(error), str(error)
    finally:
        setattr(train, during, original)
    return type(None), ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("during", "written", "lines"),
    [
        ("set_up", [], []),
        ("evaluate", ["environment.jsonl"], []),
        ("train_step", ["environment.jsonl", "examples.json", "metrics.jsonl"], ["eval"]),
    ],
)
def test_a_run_that_was_taken_over_writes_nothing_any_more(
    tmp_path: Path, during: str, written: list[str], lines: list[str]
) -> None:
    bad = [Sample(f"bad{n}", b"nothing", ("a",)) for n in range(10)]
    good = [make_sample(n) for n in range(40)]
    mixed = [sample for n in range(10) for sample in (bad[n], *good[4 * n : 4 * n + 4])]
    write_shards(tmp_path / "shards", {"train": [mixed], "val": [good[:8]]})
    overrides = _overrides(tmp_path / "shards", tmp_path / "run", "data.max_bad=1")
    ((kind, told),) = run_distributed(_be_taken_over, 1, overrides, during)
    assert kind is lease.LostLease, told
    files = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert sorted(files - {"config.yaml", "vocabulary.json", "lease.json"}) == written
    found = read_lines(tmp_path / "run") if "metrics.jsonl" in written else []
    assert [line["kind"] for line in found] == lines


@pytest.mark.slow
def test_evaluation_and_export_take_the_averaged_weights(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = _overrides(shards, run_dir, "ema.samples=64", "engine.zero_stage=3")
    assert run_distributed(_run, 2, overrides) == [0, 0]
    assert eval_run(run_dir, split="val", data=None) == 0
    last = [line for line in read_lines(run_dir) if line["kind"] == "eval"][-1]
    found = json.loads((run_dir / "eval-val.json").read_text())["trained"]
    assert found["rsum"] == pytest.approx(last["rsum"], abs=1e-9)
    weights, trained = _weights(run_dir), open_trained(run_dir).model.state_dict()
    unequal = {name for name in weights if not torch.equal(weights[name], trained[name])}
    assert {name.split(".")[0] for name in unequal} == {"image", "text"}
