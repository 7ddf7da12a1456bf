"""Any byte of a run may be damaged: the same result, one line, or the next older checkpoint.

A silent other result would be the worst. A seed names each damage, so that it can be repeated.
"""

import random
import shutil
from pathlib import Path

import pytest

from dist_vse import cli, train
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.runs import checkpoint
from dist_vse.runs.files import CHECKPOINTS
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed
from tests.support.flipped import damage
from tests.support.runs import CONFIG, run, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = ("global_batch_size=8", "chunk_size=8", "log_every=1", "checkpoint_every=1")
RESUMED, READ = 11, 33  # damages
OLDER, NEWEST = "step-000001", "step-000002"
FILES = (
    *("config.yaml", "metrics.jsonl", "environment.jsonl", "lease.json", "vocabulary.json"),
    *("examples.json", "skipped.jsonl"),
    *(f"checkpoints/{NEWEST}/{name}" for name in ("manifest.json", "manifest.json")),
    *(f"checkpoints/{NEWEST}/{name}" for name in ("model.safetensors", "rank-0.safetensors")),
    f"checkpoints/{OLDER}/manifest.json",
)


def _more(shards: Path, run_dir: Path, steps: int) -> list[str]:
    return settings(shards, run_dir, *SETTINGS, f"total_steps={steps}")


def _weights(run_dir: Path) -> bytes:
    return (run_dir / CHECKPOINTS / "step-000003" / "model.safetensors").read_bytes()


def _train_and_resume(folder: Path) -> list[str]:
    """Train two steps, then the third one in an undamaged copy and in damaged ones.

    Returns the damages after which the weights differ in silence.
    """
    shards, whole = folder / "shards", folder / "whole"
    assert run(_more(shards, whole, 2)) == 0
    (whole / "skipped.jsonl").write_text('{"step": 1, "key": "k", "epoch": 0}\n')
    shutil.copytree(whole, folder / "same")
    assert run(_more(shards, folder / "same", 3)) == 0
    wrong = []
    for seed in range(RESUMED):
        copy, name = folder / f"resumed-{seed}", FILES[seed % len(FILES)]
        shutil.copytree(whole, copy)
        _damage(copy / name, seed)
        try:
            code = train.run(load_config(CONFIG, _more(shards, copy, 3)))
        except UserError as error:
            if "\n" in str(error):
                wrong.append(f"seed {seed}, {name}: {error!r}")
            continue
        if code != 0 or _weights(copy) != _weights(folder / "same"):
            wrong.append(f"seed {seed}, {name}: code {code}, other weights")
        shutil.rmtree(copy)
    return wrong


def _damage(path: Path, seed: int) -> None:
    path.write_bytes(damage(path.read_bytes(), random.Random(seed)))


def test_a_damaged_run_is_resumed_exactly_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "shards", {"train": 24, "val": 4})
    assert run_distributed(_train_and_resume, 1, tmp_path, timeout=200) == [[]]
    _assert_commands_say_one_line(tmp_path, capsys)


def _assert_commands_say_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = folder / "whole"
    for seed in range(READ):
        copy, name = folder / "read", FILES[seed % len(FILES)]
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        _damage(copy / name, seed)
        for command in (["report", str(copy)], ["runs", str(copy)]):
            code = cli.main(command)
            errors = capsys.readouterr().err.splitlines()
            older = code == 0 and len(errors) == 1 and "skipped" in errors[0]
            right = older or (code, len(errors)) in ((0, 0), (2, 1))
            assert right, (seed, name, command, errors)
        found = checkpoint.latest(copy / CHECKPOINTS)
        assert found is not None and found.name in (OLDER, NEWEST), (seed, name)
        for file in checkpoint.read_manifest(found)["files"]:  # what is believed is as written
            original = whole / CHECKPOINTS / found.name / file
            assert (found / file).read_bytes() == original.read_bytes(), (seed, name)
