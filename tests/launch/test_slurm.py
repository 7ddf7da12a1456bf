"""What a job of Slurm does at its end, with a stand-in for Slurm's commands.

The real ones are in tests/slurm; these are quick, and run where Slurm can't.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.launch.cancel import cancel
from dist_vse.launch.job import Job
from dist_vse.launch.outcome import find_outcome
from dist_vse.launch.result import Result, write_result
from dist_vse.launch.runs import find_runs, table
from dist_vse.launch.schedulers import sbatch, scontrol
from dist_vse.launch.schedulers.base import SubmittedJob
from dist_vse.launch.schedulers.slurm import Slurm
from dist_vse.launch.status import ensure_not_running, status
from dist_vse.runs.lease import LostLease
from tests.support.paths import ROOT

RUNNING = "JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that records what it is asked, and answers as the files beside it say."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "scontrol"
    path.write_text(
        f"""#!/bin/bash
cd {folder}
echo "$@" >>asked
[ "$(wc -l <asked)" -gt "$(cat silent)" ] || {{ echo "Unable to contact controller" >&2; exit 1; }}
case "$*" in
    *requeue*) cat refusal >&2; [ ! -s refusal ] ;;
    *) cat state; [ -s state ] || {{ echo "Invalid job id specified" >&2; exit 1; }} ;;
esac
"""
    )
    path.chmod(0o755)
    for name, text in {"silent": "0", "refusal": "", "state": RUNNING}.items():
        (folder / name).write_text(text)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(scontrol, "RETRY_EVERY_S", 0.01)
    monkeypatch.setattr(scontrol, "_KILL_WAIT_S", 0)
    return folder


def _asked(slurm: Path) -> list[str]:
    return (slurm / "asked").read_text().splitlines()


def test_slurm_that_does_not_answer_is_asked_again(slurm: Path) -> None:
    (slurm / "silent").write_text("3")
    scontrol.requeue("7")
    assert _asked(slurm)[3:] == ["--oneliner show job 7", "requeue 7"]


def test_a_refusal_is_reported_in_the_end(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scontrol, "RETRY_FOR_S", 0.1)
    (slurm / "refusal").write_text("Requested operation is presently disabled\n")
    with caplog.at_level(logging.ERROR):
        scontrol.requeue("7")
    assert _asked(slurm).count("requeue 7") > 1
    assert "presently disabled); submit the run again to continue it" in caplog.text


def _batch_script(folder: Path, restarts: int) -> None:
    """Run the shell lines around a step that fails."""
    lines = ["sleep() { :; }", *sbatch.try_again(folder, failures=1), "exit 1"]
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    subprocess.run(["bash", "-c", "\n".join(lines)], env={**os.environ, **variables}, timeout=20)


def test_a_failed_job_is_tried_again_so_often_and_by_its_own_attempt(
    slurm: Path, tmp_path: Path
) -> None:
    (slurm / "silent").write_text("3")
    _batch_script(tmp_path, restarts=0)
    assert _asked(slurm)[3:] == ["-o show job 7", "requeue 7"]
    (slurm / "state").write_text(RUNNING.replace("Restarts=0", "Restarts=1"))
    _batch_script(tmp_path, restarts=0)  # of an earlier attempt, on a node that has come back
    assert _asked(slurm)[5:] == ["-o show job 7"]
    _batch_script(tmp_path, restarts=1)
    assert _asked(slurm)[6:] == ["-o show job 7"]  # one failure too many
    assert (tmp_path / "failures-7").read_text().splitlines() == ["failed"] * 2


def half_a_run() -> int:
    """End as a run does that has saved before its last step."""
    return 130


def fail_by_a_user_error() -> int:
    """End as a job does that has reported an error of the user."""
    return 2


def lose_the_run() -> int:
    """End as an earlier attempt of a job does."""
    raise LostLease("taken")


def _run_on_slurm(folder: Path, work: object) -> subprocess.CompletedProcess[str]:
    """Start a job's only rank as srun does."""
    from submitit.core.utils import DelayedSubmission

    jobs = folder / "7"
    jobs.mkdir(exist_ok=True)
    job = Job(work, Slurm(), {}, str(ROOT))  # type: ignore[arg-type]
    DelayedSubmission(job).dump(jobs / "7_submitted.pkl")
    variables = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "submitit.core._submit", str(jobs)]
    return subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )


def test_half_a_run_is_no_success_of_its_job(slurm: Path, tmp_path: Path) -> None:
    job = SubmittedJob("7", "slurm", str(tmp_path / "7" / "7_RANK_log.err"), 1, "h")
    (slurm / "state").write_text(RUNNING.replace("Requeue=1", "Requeue=0"))
    assert _run_on_slurm(tmp_path, half_a_run).returncode == 130
    assert find_outcome(job, "FAILED") == (130, [])
    assert not (tmp_path / "final-7").exists()
    assert _run_on_slurm(tmp_path, fail_by_a_user_error).returncode == 2
    assert find_outcome(job, "FAILED") == (2, [])
    assert (tmp_path / "final-7").exists()


def test_an_earlier_attempt_leaves_no_mark_on_the_job(slurm: Path, tmp_path: Path) -> None:
    done = _run_on_slurm(tmp_path, lose_the_run)
    assert done.returncode == 1 and done.stderr.endswith("error: taken\n")
    assert not (tmp_path / "final-7").exists()
    assert not (tmp_path / "7" / "7_0_result.json").exists()


def _submitted_run(folder: Path, **values: object) -> Path:
    """Leave the file and the results of a job that failed on both ranks."""
    logs = folder / "logs" / "7_RANK_log.err"
    for path in (logs.parent, folder / "run" / "submit"):
        path.mkdir(parents=True)
    note = {"job_id": "7", "scheduler": "slurm", "logs": str(logs), "num_ranks": 2, "host": "h"}
    (folder / "run" / "submit" / "job.json").write_text(json.dumps(note | values))
    for rank in (0, 1):
        error = "dist_vse.common.errors.UserError: no room; make some"
        write_result(logs.with_name(f"7_{rank}_log.err"), Result(1, error))
    return folder / "run"


def test_status_and_runs_say_why_a_job_failed_even_a_forgotten_one(
    slurm: Path, tmp_path: Path
) -> None:
    run_dir = _submitted_run(tmp_path)
    assert "ended:" not in status(run_dir)  # it runs: these are of an earlier attempt
    cause = f"2 ranks: no room; make some (log: {tmp_path}/logs/7_0_log.err)"
    for state, word in (("JobState=FAILED Requeue=1", "FAILED"), ("", "FORGOTTEN")):
        (slurm / "state").write_text(state)
        lines = status(run_dir).splitlines()
        assert lines[0].startswith(f"job 7 (slurm): {word}")
        assert f"ended: {cause}" in lines
        _, row, last = table([run_dir]).splitlines()
        assert row.split() == ["run", word.lower(), "0/0"] and last == f"run: {cause}"
    for rank in (0, 1):
        write_result(tmp_path / "logs" / f"7_{rank}_log.err", Result(130))
    assert "ended: saved and stopped; submit the run again" in status(run_dir)
    (tmp_path / "logs" / "7_1_result.json").unlink()
    (tmp_path / "logs" / "7_0_result.json").unlink()
    assert "2 ranks: killed, or exited without a result (FORGOTTEN)" in status(run_dir)


def test_a_local_job_of_another_machine(tmp_path: Path) -> None:
    run_dir = _submitted_run(tmp_path, scheduler="local", job_id="999999999", host="elsewhere")
    assert "(local): UNKNOWN here: its processes run on elsewhere; ask there\n" in status(run_dir)
    with pytest.raises(UserError, match="can't be cancelled here: its processes run on elsewhere"):
        cancel(run_dir)
    ensure_not_running(run_dir)  # unknown from here; a second attempt would take the lease


def test_a_run_of_another_version_is_one_row_with_its_reason(tmp_path: Path) -> None:
    for name, text in (("good", "seed: 1"), ("bad", "sede: 1"), ("waits", None)):
        folder = tmp_path / "runs" / name
        (folder / "submit").mkdir(parents=True)
        if text is not None:
            (folder / "config.yaml").write_text(f"{{output_dir: x, {text}}}")
    submit = tmp_path / "runs" / "waits" / "submit"
    (submit / "job.json").write_text("{}")
    for age, name in enumerate(("a", "z", "m")):  # the youngest is neither first nor last
        path = submit / f"config-{name}.yaml"
        path.write_text(f"{{output_dir: x, seed: {10 + age}}}")
        os.utime(path, (1000 + age, 1000 + age))
    lines = table(find_runs([tmp_path / "runs"])).splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["run", "seed"],
        ["good", "1"],
        ["waits", "12"],
        ["bad", "unreadable"],
    ]
    assert lines[4].startswith("bad: ") and "did you mean 'seed'" in lines[4]
