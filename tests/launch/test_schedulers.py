"""The table of schedulers: a new one is a class and a row, and nothing else knows their names."""

import ast
from pathlib import Path

import pytest

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.launch.schedulers import SCHEDULERS, find_scheduler
from dist_vse.launch.schedulers.base import SubmittedJob, load_job
from dist_vse.launch.status import last_metrics
from tests.launch.toy_scheduler import Toy
from tests.support.datasets import write_dataset
from tests.support.imports import sources
from tests.support.jobs import results
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

CONFIG = str(ROOT / "configs" / "debug_cpu.yaml")


@pytest.fixture
def toy_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cluster file of two ranks for a scheduler that only the table knows."""
    monkeypatch.setitem(SCHEDULERS, "toy", Toy())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the ranks import the class
    path = tmp_path / "cluster.yaml"
    path.write_text("{scheduler: toy, processes_per_node: 2, partition: p}")
    return str(path)


def test_a_scheduler_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert find_scheduler("auto").name == "local"
    monkeypatch.setattr("shutil.which", lambda _: "/bin/it")
    assert find_scheduler("auto").name == "slurm"
    assert all(find_scheduler(name).name == name for name in SCHEDULERS)
    with pytest.raises(UserError, match="did you mean 'slurm'"):
        find_scheduler("slrum")
    with pytest.raises(UserError, match="choose one of auto, slurm, local"):
        find_scheduler("pbs")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_new_scheduler_needs_only_its_row_in_the_table(
    toy_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", {"train": [64], "val": [16]})

    def submit(name: str, *more: str) -> tuple[Path, int]:
        folder = tmp_path / name
        settings = [f"data.index={tmp_path}/data", f"output_dir={folder}", "log_every=1"]
        overrides = [*settings, *(word for word in more if "=" in word)]
        flags = [word for word in more if "=" not in word]
        command = ["submit", CONFIG, *overrides, "--cluster", toy_cluster, *flags]
        return folder, cli.main(command)

    folder, code = submit("shown", "--dry-run")
    shown = capsys.readouterr().out.splitlines()
    assert code == 0 and shown[0] == "2 toy processes" and not folder.exists()
    assert shown[-1] == "ignored by scheduler toy: partition=p"

    folder, code = submit("whole", "total_steps=2", "--wait")
    out = capsys.readouterr().out
    assert code == 0 and "a toy rank\n" in out and "a toy rank returns 0\n" in out
    last = last_metrics(folder).get("train")
    assert last is not None and last["step"] == 2

    folder, code = submit("cancelled", "total_steps=100000")
    job = load_job(folder)
    assert code == 0 and job.scheduler == "toy"
    wait_until(lambda: last_metrics(folder).get("train"), "the first step")
    assert submit("cancelled", "total_steps=100000")[1] == 2
    assert f"job {job.job_id} of this run is RUNNING" in capsys.readouterr().err
    _run_command("status", folder)
    assert f"job {job.job_id} (toy): RUNNING\n" in capsys.readouterr().out
    _run_command("cancel", folder)
    assert results(job) == [130, 130]
    _run_command("status", folder)
    assert "ended: saved and stopped; submit the run again" in capsys.readouterr().out
    _run_command("logs", folder)
    assert "stopped at step" in capsys.readouterr().out


def _run_command(name: str, folder: Path) -> None:
    assert cli.main([name, str(folder)]) == 0


def test_a_job_is_read_as_it_was_saved(tmp_path: Path) -> None:
    (tmp_path / "submit").mkdir()
    job = SubmittedJob("7", "slurm", f"{tmp_path}/7_RANK_log.err", 2, "h")
    job.save(tmp_path)
    assert load_job(tmp_path) == job
    assert job.log(1) == tmp_path / "7_1_log.err"
    (tmp_path / "submit" / "job.json").write_text('{"job": 7}')
    with pytest.raises(UserError, match="written by another version"):
        load_job(tmp_path)


@pytest.mark.parametrize("path", sources("launch"), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_schedulers_know_their_names(path: Path) -> None:
    if path.parent.name == "schedulers":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare | ast.Dict | ast.MatchValue):
            names = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            assert not names & {"slurm", "local"}, f"{path.name}:{node.lineno} asks by name"
