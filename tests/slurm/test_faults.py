"""Faults on the real cluster: the run goes on exactly, or ends with one message."""

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_vse import train
from dist_vse.config import load_config
from dist_vse.launch.cancel import cancel
from dist_vse.launch.job import Job, Train
from dist_vse.launch.runs import find_runs, table
from dist_vse.launch.schedulers.base import SubmittedJob
from dist_vse.launch.status import status
from dist_vse.launch.submit import Plan, plan_submission, start, submit
from dist_vse.launch.sweep import plan_sweep, submit_sweep
from dist_vse.launch.tail_log import report
from tests.slurm.cluster import Cluster
from tests.slurm.recorded import (
    RecordedTrain,
    hold_python,
    num_waiting,
    pause_at,
    poison,
    release,
    samples_trained_on,
)
from tests.support.distributed import run_distributed
from tests.support.jobs import pickled_work
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

CONFIG = ROOT / "configs" / "debug_cpu.yaml"
STEPS = 20  # of 32 pairs: each of the 640 samples once
SETTINGS = (
    f"total_steps={STEPS}",
    "log_every=1",
    "checkpoint_every=3",
    "loss.learn_temperature=true",
    "model.text.dropout=0.2",
)


def _plan(
    data: Path, folder: Path, nodes: int, cluster: str = "", settings: Sequence[str] = ()
) -> Plan:
    path = folder / "cluster.yaml"
    path.write_text(
        f"{{scheduler: slurm, nodes: {nodes}, time_min: 10, mem_gib: 1,"
        f" env: {{DS_ACCELERATOR: cpu}}{cluster}}}"
    )
    run = [f"data.index={data}", f"output_dir={folder}/run", *SETTINGS, *settings]
    return plan_submission(CONFIG, run, path)


def _send(plan: Plan, folder: Path, pauses: Sequence[int]) -> SubmittedJob:
    """Submit a recorded run."""
    plan.folder.mkdir(parents=True)
    plan.config_path.write_text(plan.config_text)
    for step in pauses:
        pause_at(folder, step)
    work = RecordedTrain(Train(str(plan.config_path)), str(folder))
    root = str(ROOT)
    env = {**plan.env, "PYTHONPATH": f"{plan.env['PYTHONPATH']}{os.pathsep}{root}"}
    return start(plan, Job(work, plan.scheduler, env, root))


@pytest.fixture(autouse=True)
def _tests_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def _train(overrides: list[str]) -> int:
    return train.run(load_config(CONFIG, overrides))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of one and two processes on this machine that nobody disturbed."""
    runs = {}
    for world_size in (1, 2):
        runs[world_size] = tmp_path_factory.mktemp(f"undisturbed{world_size}")
        overrides = [f"data.index={data}", f"output_dir={runs[world_size]}", *SETTINGS]
        assert run_distributed(_train, world_size, overrides) == [0] * world_size
    return runs


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors")


def _assert_exact(folder: Path, undisturbed: Path, *, run_dir: Path | None = None) -> None:
    """Check that all samples were seen once, and that the final weights are those to the bit."""
    trained = samples_trained_on(folder)
    assert len(trained) == len(set(trained)) == STEPS * 32
    expected, found = _weights(undisturbed), _weights(run_dir or folder / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def _wait_at(folder: Path, step: int, ranks: int) -> None:
    wait_until(lambda: num_waiting(folder, step) >= ranks, f"{ranks} ranks at step {step}")


@pytest.mark.timeout(400)
def test_time_limit_requeue_preemption_and_node_loss_cost_nothing(
    cluster: Cluster, data: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    job = _send(_plan(data, tmp_path, nodes=2), tmp_path, (4, 8, 12, 17))
    _wait_at(tmp_path, 4, 2)
    cluster("scancel", "--signal=USR2", job.job_id)  # what comes before the time limit
    with cluster.controller_away():
        release(tmp_path, 4)
        wait_until(lambda: "will ask again" in _log(job, 0), "an answer that did not come")
    _wait_at(tmp_path, 8, 2)
    cluster("scontrol", "requeue", job.job_id)
    release(tmp_path, 8)
    _wait_at(tmp_path, 12, 2)
    urgent = cluster.sbatch("-p", "high", "-N3", "--exclusive", "--wrap=true")
    wait_until(lambda: cluster.job(job.job_id, "PreemptTime") != "None", "the preemption")
    release(tmp_path, 12)
    _wait_at(tmp_path, 17, 2)
    assert cluster.job(urgent, "JobState") == "COMPLETED"
    assert cluster.job(job.job_id, "NodeList") == "n[0-1]"
    cluster("crash", "n1")  # the checkpoint of step 15 is the last one
    cluster.bring_down("n1")
    release(tmp_path, 17)
    assert cluster.wait_for_end(job.job_id) == "COMPLETED", _log(job, 0)
    assert cluster.job(job.job_id, "Restarts") == "4"
    assert cluster.job(job.job_id, "NodeList") == "n[0,2]"
    _assert_exact(tmp_path, undisturbed[2])


def _log(job: SubmittedJob, rank: int) -> str:
    return job.log(rank).read_text()


def _rank_on(cluster: Cluster, node: str) -> int:
    (pid,) = cluster.ranks(node)
    return pid


@pytest.mark.timeout(400)
def test_a_killed_and_a_hanging_rank_are_started_again_so_often(
    cluster: Cluster, data: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    plan = _plan(data, tmp_path, nodes=2, cluster=", failures: 2, hang_s: 20")
    job = _send(plan, tmp_path, (5, 11, 18))
    _wait_at(tmp_path, 5, 2)
    os.kill(_rank_on(cluster, "n1"), signal.SIGKILL)
    release(tmp_path, 5)
    _wait_at(tmp_path, 11, 2)
    os.kill(_rank_on(cluster, "n1"), signal.SIGSTOP)
    release(tmp_path, 11)
    _wait_at(tmp_path, 18, 2)
    os.kill(_rank_on(cluster, "n0"), signal.SIGKILL)  # one failure too many
    release(tmp_path, 18)
    assert cluster.wait_for_end(job.job_id) == "FAILED"
    assert cluster.job(job.job_id, "Restarts") == "2"
    again = start(plan, pickled_work(job))
    assert cluster.wait_for_end(again.job_id) == "COMPLETED", _log(again, 0)
    _assert_exact(tmp_path, undisturbed[2])


def _fill(folder: Path) -> Path:
    """Leave no room on the file system of `folder` but some log lines; return what takes it."""
    ballast = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    ballast.write_bytes(bytes(free - 100_000))
    return ballast


def _assert_ended_with_one_message(cluster: Cluster, job: Any, capfd: Any, message: str) -> None:
    assert cluster.wait_for_end(job.job_id) == "FAILED"
    assert cluster.job(job.job_id, "Restarts") == "0"
    assert report(job) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines


@pytest.mark.timeout(300)
def test_an_error_of_the_user_ends_all_ranks_and_then_costs_nothing(
    cluster: Cluster,
    data: Path,
    undisturbed: dict[int, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    infinite, full = tmp_path / "infinite", tmp_path / "full"
    plans, jobs = {}, {}
    for folder in (infinite, full):
        folder.mkdir()
        plans[folder] = _plan(data, folder, 2, ", failures: 3")
    poisoned = poison(infinite, 8)
    jobs[infinite] = _send(plans[infinite], infinite, ())
    small = f"output_dir: {cluster.small_disk}/run"
    text = plans[full].config_text.replace(f"output_dir: {full}/run", small)
    plans[full] = replace(plans[full], config_text=text)
    jobs[full] = _send(plans[full], full, (8,))
    _wait_at(full, 8, 2)
    ballast = _fill(Path(cluster.small_disk))
    release(full, 8)
    _assert_ended_with_one_message(cluster, jobs[infinite], capfd, "the loss is inf")
    _assert_ended_with_one_message(cluster, jobs[full], capfd, "No space left on device")
    poisoned.unlink()
    ballast.unlink()
    again = [start(plans[f], pickled_work(jobs[f])) for f in (infinite, full)]
    for job in again:
        assert cluster.wait_for_end(job.job_id) == "COMPLETED", _log(job, 0)
    _assert_exact(infinite, undisturbed[2])
    _assert_exact(full, undisturbed[2], run_dir=Path(cluster.small_disk) / "run")


@pytest.mark.timeout(200)
def test_a_job_that_may_not_be_queued_again_saves_and_ends(
    cluster: Cluster, data: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    plan = _plan(data, tmp_path, nodes=1, cluster=", requeue: false")
    job = _send(plan, tmp_path, (5,))
    _wait_at(tmp_path, 5, 1)
    cluster("scancel", "--signal=USR2", job.job_id)
    release(tmp_path, 5)
    assert cluster.wait_for_end(job.job_id) == "FAILED"  # nothing may start after half a run
    assert cluster.job(job.job_id, "ExitCode") == f"{train.INTERRUPTED}:0"
    assert report(job) == train.INTERRUPTED
    assert "requeue: false, so the job ends here" in _log(job, 0)
    again = start(plan, pickled_work(job))
    assert cluster.wait_for_end(again.job_id) == "COMPLETED", _log(again, 0)
    assert report(again) == 0
    _assert_exact(tmp_path, undisturbed[1])


@pytest.mark.timeout(300)
def test_an_orphan_of_an_earlier_attempt_can_not_write(
    cluster: Cluster, data: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    plan = _plan(data, tmp_path, 1, ", failures: 1")
    job = _send(plan, tmp_path, (8,))
    _wait_at(tmp_path, 8, 1)
    node = cluster.job(job.job_id, "NodeList")
    orphan = _rank_on(cluster, node)
    cluster.kill_slurmd(node)  # the job's processes live on, and nobody can end them
    cluster.bring_down(node)
    _wait_at(tmp_path, 8, 2)
    assert cluster.job(job.job_id, "NodeList") != node
    os.kill(orphan, 0)
    release(tmp_path, 8)
    wait_until(lambda: orphan not in cluster.ranks(node), "the orphan's end")
    assert cluster.wait_for_end(job.job_id) == "COMPLETED"
    # Nor does its batch script queue the living job again, or forbid another try.
    assert cluster.job(job.job_id, "Restarts") == "1"
    assert not [*plan.jobs.glob("f*-*")], "failures-JOB or final-JOB"
    assert report(job) == 0
    assert "a later attempt of this run has taken it over" in _log(job, 0)
    _assert_exact(tmp_path, undisturbed[1])


@pytest.mark.timeout(200)
def test_a_signal_before_the_imports_are_done_does_not_kill_the_job(
    cluster: Cluster, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "3")  # sbatch would prefer it to the cluster's file
    gate = hold_python(tmp_path)
    path = f"{gate.parent}{os.pathsep}{ROOT}"
    inside = f", container: env INSIDE=container PYTHONPATH={path}"
    job = submit(_plan(data, tmp_path, 1, inside, ["total_steps=2"]))
    wait_until(lambda: cluster.job(job.job_id, "JobState") == "RUNNING", "the start")
    node = cluster.job(job.job_id, "NodeList")
    wait_until(lambda: cluster.ranks(node), "Python's start")
    variables = Path(f"/proc/{_rank_on(cluster, node)}/environ").read_bytes().split(b"\0")
    for _ in range(5):
        cluster("scancel", "--signal=USR2", job.job_id)
    gate.touch()
    assert b"INSIDE=container" in variables and b"DS_ACCELERATOR=cpu" in variables
    assert cluster.job(job.job_id, "TimeLimit") == "00:10:00"
    assert cluster.wait_for_end(job.job_id) == "COMPLETED", _log(job, 0)
    assert cluster.job(job.job_id, "Restarts") == "0"


@pytest.mark.timeout(200)
def test_a_cancelled_job_saves_and_can_be_continued(
    cluster: Cluster, data: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    plan = _plan(data, tmp_path, nodes=1)
    job = _send(plan, tmp_path, (5,))
    _wait_at(tmp_path, 5, 1)
    assert f"asked job {job.job_id}" in cancel(tmp_path / "run")
    release(tmp_path, 5)
    assert cluster.wait_for_end(job.job_id) == "CANCELLED"
    assert "last checkpoint: step-000005" in status(tmp_path / "run")
    again = start(plan, pickled_work(job))
    assert cluster.wait_for_end(again.job_id) == "COMPLETED", _log(again, 0)
    _assert_exact(tmp_path, undisturbed[1])


@pytest.mark.timeout(400)
def test_signals_of_scancel_and_a_controller_started_again_cost_nothing(
    cluster: Cluster, data: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    plan = _plan(data, tmp_path, nodes=1)
    job = _send(plan, tmp_path, (4, 7, 10))
    _wait_at(tmp_path, 4, 1)
    cluster("scancel", "--signal=INT", job.job_id)  # a first one asks for a save
    release(tmp_path, 4)
    _wait_at(tmp_path, 7, 1)
    assert cluster.job(job.job_id, "Restarts") == "1"
    cluster("restart")
    release(tmp_path, 7)
    _wait_at(tmp_path, 10, 1)
    cluster("scancel", "--signal=KILL", job.job_id)
    assert cluster.wait_for_end(job.job_id) in ("FAILED", "CANCELLED")
    assert "ended: " in status(tmp_path / "run")
    release(tmp_path, 10)
    again = start(plan, pickled_work(job))
    assert cluster.wait_for_end(again.job_id) == "COMPLETED", _log(again, 0)
    _assert_exact(tmp_path, undisturbed[1])


@pytest.mark.timeout(200)
def test_a_job_cancelled_in_the_queue_starts_nothing_and_a_sweep_outlives_a_bad_run(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    holder = cluster.sbatch("-N3", "--exclusive", "--wrap=sleep 600")
    wait_until(lambda: cluster.job(holder, "JobState") == "RUNNING", "the holder")
    job = submit(_plan(data, tmp_path, 1, settings=["total_steps=1"]))
    assert cluster.job(job.job_id, "JobState") == "PENDING"
    assert "PENDING" in table(find_runs([tmp_path])).upper()
    cancel(tmp_path / "run")
    assert cluster.wait_for_end(job.job_id) == "CANCELLED"
    assert "not started yet" in status(tmp_path / "run")
    cluster("scancel", holder)

    base = [f"output_dir={tmp_path}/sweep", *SETTINGS, "total_steps=1"]
    axes = [f"data.index={data},{tmp_path}/nowhere"]
    plans = plan_sweep(CONFIG, base, axes, tmp_path / "cluster.yaml")
    good, bad = submit_sweep(plans, parallel=2)
    assert cluster.wait_for_end(good.job_id) == "COMPLETED", _log(good, 0)
    assert cluster.wait_for_end(bad.job_id) == "FAILED"
    *rows, cause = table(find_runs([tmp_path / "sweep"])).splitlines()
    assert sorted(row.split()[2] for row in rows[1:]) == ["completed", "failed"]
    assert "no such index" in cause
