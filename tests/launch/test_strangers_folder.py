"""A run's folder that somebody else made: the commands run nothing of it, and stay whole."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.launch import code
from dist_vse.launch.outcome import find_outcome
from dist_vse.launch.schedulers.base import SubmittedJob, load_job


class _Bomb:
    """A pickle of this runs a command when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)


def _run(folder: Path, **values: object) -> Path:
    """Make the folder of a local job that has ended."""
    (folder / "submit" / "999999999").mkdir(parents=True)
    logs = str(folder / "submit" / "999999999" / "999999999_RANK_log.err")
    host = os.uname().nodename
    job = {"job_id": "999999999", "scheduler": "local", "logs": logs, "num_ranks": 1, "host": host}
    (folder / "submit" / "job.json").write_text(json.dumps(job | values))
    (folder / "config.yaml").write_text("output_dir: x\ntotal_steps: 9\n")
    return folder


@pytest.mark.parametrize("command", ["status", "runs", "logs", "cancel"])
def test_no_command_reads_a_pickle(command: str, tmp_path: Path) -> None:
    run_dir, target = _run(tmp_path / "run"), tmp_path / "PWNED"
    for name in ("999999999_0_result.pkl", "999999999_submitted.pkl", "999999999_0_result.json"):
        content = pickle.dumps(("success", _Bomb(target)))
        (run_dir / "submit" / "999999999" / name).write_bytes(content)
    (run_dir / "submit" / "999999999" / "999999999_0_log.err").write_text("a log\n")
    assert cli.main([command, str(run_dir)]) in (0, 2)
    assert not target.exists()
    pickle.loads(pickle.dumps(_Bomb(target)))  # it would have
    assert target.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"code": "0", "error": ""}', '{"code": 0}', '{"code": 1e9}']
)
def test_a_damaged_result_is_a_cause(content: str, tmp_path: Path) -> None:
    job = load_job(_run(tmp_path))
    Path(job.logs.replace("RANK_log.err", "0_result.json")).write_text(content)
    exit_code, (line,) = find_outcome(job, "ENDED")
    assert exit_code == 1 and "its result can't be read" in line


@pytest.mark.parametrize(
    "values",
    [
        {"job_id": "--user=root"},
        {"job_id": "abc"},
        {"job_id": "7 8"},
        {"job_id": 7},
        {"job_id": "7\n"},
        {"job_id": "٣"},
        {"num_ranks": 10**9},
        {"num_ranks": 0},
        {"num_ranks": True},
        {"num_ranks": "1"},
        {"logs": 5},
        {"host": None},
        {"scheduler": []},
        {"more": 1},
    ],
)
def test_the_notes_of_a_job_are_checked(
    values: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = _run(tmp_path / "run", **values)
    with pytest.raises(UserError, match=r"job\.json: damaged, or written by another version"):
        load_job(run_dir)
    for command in ("status", "cancel", "logs"):
        assert cli.main([command, str(run_dir)]) == 2
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_ids_of_real_jobs_are_taken(tmp_path: Path) -> None:
    for number, job_id in enumerate(("7", "123_45")):
        assert isinstance(load_job(_run(tmp_path / str(number), job_id=job_id)), SubmittedJob)


@pytest.mark.parametrize(
    "metrics",
    [
        b"\xff\xfe\n",
        b"5\n{}\n[]\n",
        b'{"kind": "train", "step": "x", "loss": 1}\n',
        b'{"kind": "train", "step": 1, "loss": "x"}\n{"kind": "eval", "step": 1, "rsum": "x"}\n',
        b'{"kind": "train", "step": 1, "loss": null}\n' + b"[" * 100_000 + b"\n",
    ],
)
def test_one_bad_run_hides_no_other(
    metrics: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = b'{"kind": "train", "step": 3, "loss": 2.5}\n'
    (_run(tmp_path / "bad") / "metrics.jsonl").write_bytes(metrics)
    (_run(tmp_path / "good") / "metrics.jsonl").write_bytes(metrics + good + metrics)
    assert cli.main(["runs", str(tmp_path)]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["good"][2:4] == ["3/9", "2.5"] and rows["bad"][2:] == ["0/9"]
    assert cli.main(["status", str(tmp_path / "good")]) == 0
    assert "step 3/9, loss 2.5000" in capsys.readouterr().out


def test_code_that_is_not_ours_is_not_run(tmp_path: Path) -> None:
    ours = code.code_folder(tmp_path)
    code.pin(ours)
    compiled = ours / "dist_vse" / "__pycache__"
    compiled.mkdir()
    (compiled / "train.cpython-311.pyc").write_bytes(b"anything")
    code.pin(ours)
    assert not compiled.exists()

    def changed(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(ours, folder)
        return folder

    edited = changed("edited")
    (edited / "dist_vse" / "train.py").write_text("import os\n")
    added = changed("added")
    (added / "sitecustomize.py").write_text("import os\n")
    linked = changed("linked")
    (linked / "numpy").symlink_to(tmp_path)
    missing = changed("missing")
    (missing / "dist_vse" / "launch" / "job.py").unlink()
    for folder in (edited, added, linked, missing):
        with pytest.raises(UserError, match="is no copy of this installation's code"):
            code.pin(folder)
