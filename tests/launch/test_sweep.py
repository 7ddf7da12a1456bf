"""Sweeps and the commands that look at submitted runs, with real local jobs."""

import json
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.launch.cancel import cancel
from dist_vse.launch.dry_run import dry_run
from dist_vse.launch.runs import find_runs, table
from dist_vse.launch.schedulers.base import load_job
from dist_vse.launch.status import job_state, last_metrics, status
from dist_vse.launch.submit import plan_submission, submit
from dist_vse.launch.sweep import plan_sweep, settings, submit_sweep
from dist_vse.launch.tail_log import show_log
from tests.support.datasets import write_dataset
from tests.support.jobs import results
from tests.support.paths import ROOT

CONFIG = ROOT / "configs" / "debug_cpu.yaml"


@pytest.fixture
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "cluster.yaml"
    path.write_text("{scheduler: local, time_min: 10, env: {DS_ACCELERATOR: cpu}}")
    return path


def test_settings_are_all_combinations() -> None:
    assert settings(["a=1,2", "b=x"]) == [["a=1", "b=x"], ["a=2", "b=x"]]
    assert settings(["b=[1,2],[3,4],5"]) == [["b=[1,2]"], ["b=[3,4]"], ["b=5"]]
    for wrong, message in (
        (["a"], "write key=value,value"),
        (["a="], "write key=value,value"),
        (["a=1", "a=2"], "gives a twice"),
        (["output_dir=a,b"], "a folder of its own"),
        (["a=" + ",".join("1" * 1001)], "1001 runs"),
    ):
        with pytest.raises(UserError, match=message):
            settings(wrong)


def test_long_settings_make_a_name_that_a_folder_can_have(
    tmp_path: Path, one_process: Path
) -> None:
    long = "model.image.weights=" + ",".join(f"{letter}{'x' * 300}" for letter in "ab")
    plans = plan_sweep(CONFIG, [f"output_dir={tmp_path}/s"], [long], one_process)
    names = [plan.folder.parent.name for plan in plans]
    assert len(set(names)) == 2 and all(len(name) < 200 for name in names)


def test_a_wrong_value_is_reported_before_anything_starts(
    tmp_path: Path, one_process: Path
) -> None:
    with pytest.raises(UserError, match="did you mean 'convse'"):
        plan_sweep(CONFIG, [f"output_dir={tmp_path}/s"], ["loss.name=convse,convs"], one_process)
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_local_sweep_and_its_table(tmp_path: Path, one_process: Path) -> None:
    write_dataset(tmp_path / "data", {"train": [64], "val": [16]})
    run = [f"data.index={tmp_path}/data", f"output_dir={tmp_path}/sweep", "total_steps=2"]
    plans = plan_sweep(CONFIG, run, ["loss.name=convse,convse++"], one_process)
    jobs = list(submit_sweep(plans, parallel=1))
    assert [results(job) for job in jobs] == [[0], [0]]
    head, *rows = table(find_runs([tmp_path / "sweep"])).splitlines()
    assert head.split() == [
        *("run", "loss.name", "state", "step", "loss", "i2t_r1", "t2i_r1", "rsum")
    ]
    cells = sorted(row.split() for row in rows)
    assert [c[:4] for c in cells] == [
        ["loss.name=convse", "convse", "ended", "2/2"],
        ["loss.name=convse++", "convse++", "ended", "2/2"],
    ]
    sums = [float(row.split()[-1]) for row in rows]
    assert sums == sorted(sums, reverse=True)
    lines = status(tmp_path / "sweep" / "loss.name=convse")
    assert "(local): ENDED after its last step\n" in lines and "step 2/2, loss " in lines
    assert "last checkpoint: step-000002" in lines


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_job_that_measures_steps_and_trains_nothing(tmp_path: Path, one_process: Path) -> None:
    run = [f"output_dir={tmp_path}/run", "global_batch_size=16", "chunk_size=8"]
    vary = ["chunk_size=16"]
    assert results(submit(plan_submission(CONFIG, run, one_process, scale=vary))) == [0]
    report = json.loads((tmp_path / "run" / "scale.json").read_text())
    rows = [(row["world_size"], row["chunk_size"]) for row in report["rows"]]
    assert rows == [(1, 8), (1, 16)]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_cancel_saves_and_the_code_is_pinned(
    tmp_path: Path, one_process: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", {"train": [64], "val": [16]})
    run_dir = tmp_path / "run"
    run = [f"data.index={tmp_path}/data", f"output_dir={run_dir}", "total_steps=100000"]
    plan = plan_submission(CONFIG, [*run, "log_every=1"], one_process)
    assert str(plan.code) in dry_run(plan)
    job = submit(plan)
    while "train" not in last_metrics(run_dir):
        assert not job_state(job).ended, job.log(0).read_text()
    assert load_job(run_dir) == job and job_state(job).name == "RUNNING"
    with pytest.raises(UserError, match=f"job {job.job_id} of this run is RUNNING"):
        submit(plan)
    maps = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    assert any(str(plan.code) in Path(f"/proc/{pid}/environ").read_text() for pid in maps)
    cancel(run_dir)
    assert results(job) == [130]
    assert "has already ended" in cancel(run_dir)
    assert "ENDED before its last step" in status(run_dir)
    show_log(run_dir, rank=0, follow=True)
    assert "stopped at step" in capsys.readouterr().out
    with pytest.raises(UserError, match="was not started by dist-vse submit"):
        status(tmp_path)
    with pytest.raises(UserError, match="no rank 7"):
        show_log(run_dir, rank=7, follow=False)
