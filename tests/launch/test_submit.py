"""Submission: plans, the environment of each rank, and real jobs of two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dist_vse.common import signals
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.launch.document import document
from dist_vse.launch.environment import IDENTITY, Place, conflicts, free_port, job_port
from dist_vse.launch.job import Job
from dist_vse.launch.result import last_message
from dist_vse.launch.schedulers.base import SubmittedJob
from dist_vse.launch.schedulers.sbatch import nested_names, script
from dist_vse.launch.status import job_state
from dist_vse.launch.submit import Plan, plan_submission, start, submit
from dist_vse.launch.tail_log import follow
from tests.support.datasets import write_dataset
from tests.support.jobs import pickled_work, results
from tests.support.paths import ROOT

CLUSTERS = ROOT / "configs" / "clusters"


Launch = Callable[..., SubmittedJob]


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}/run\nglobal_batch_size: 64\nchunk_size: 8\n")
    return path


@pytest.fixture
def local_plan(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the job imports this module
    plan = plan_submission(config_path, [], CLUSTERS / "local.yaml")
    parameters = plan.parameters | {"timeout_min": 2}
    return replace(plan, parameters=parameters)


@pytest.fixture
def launch_job(local_plan: Plan) -> Iterator[Launch]:
    """Start a function on every rank; a job that still runs at the end of the test is ended."""
    jobs = []

    def launch(
        work: Callable[[], Any], num_ranks: int = 2, env: Mapping[str, str] | None = None
    ) -> SubmittedJob:
        parameters = local_plan.parameters | {"tasks_per_node": num_ranks}
        plan = replace(local_plan, parameters=parameters, env=local_plan.env | dict(env or {}))
        jobs.append(start(plan, Job(work, plan.scheduler, plan.env, os.getcwd(), free_port())))
        return jobs[-1]

    yield launch
    for job in jobs:
        if not job_state(job).ended:
            local_plan.scheduler.kill(job)


def sum_of_ranks() -> tuple[float, dict[str, str | None]]:
    """Join the group that the job described, and add up (rank + 1) over the ranks."""
    import torch

    from dist_vse import distributed

    torch.set_num_threads(1)
    with distributed.process_group(timeout_s=60):
        total = distributed.all_reduce_sum(torch.tensor([distributed.rank() + 1.0]))
    seen = (*IDENTITY, "DS_ACCELERATOR", "TORCHELASTIC_USE_AGENT_STORE")
    return total.item(), {name: os.environ.get(name) for name in seen}


def environment_at_start() -> list[str]:
    """Return the variables that this process was started with, not what it has set since."""
    return Path("/proc/self/environ").read_text().split("\0")


def fail_before_joining() -> int:
    """Fail on rank 1; rank 0 waits for it in the rendezvous, as it would for half an hour."""
    from dist_vse import distributed

    if os.environ["RANK"] == "1":
        raise UserError("streams are wrong; take 8")
    with distributed.process_group(timeout_s=600):
        return 0


def die_after_joining() -> int:
    """Be killed on rank 1, as by a lack of memory, while rank 0 waits for it."""
    import torch

    from dist_vse import distributed

    with distributed.process_group(timeout_s=600):
        distributed.all_reduce_sum(torch.ones(1))
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.all_reduce_sum(torch.ones(1))
    return 0


def press_ctrl_c(follower: int) -> int:
    """Interrupt the process that follows the job, and stop as a run does once it is asked to."""
    signals.listen()
    os.kill(follower, signal.SIGINT)
    deadline = time.monotonic() + 60
    while not signals.asked() and time.monotonic() < deadline:
        time.sleep(0.01)
    return 130 if signals.asked() else 1


@pytest.mark.slow
def test_ranks_of_a_local_job_form_one_group(
    launch_job: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Left over by another launcher: each of them alone would break the group.
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    job = launch_job(sum_of_ranks)
    found = results(job)
    assert [total for total, _ in found] == [3.0, 3.0]
    port = pickled_work(job).port
    for rank, (_, seen) in enumerate(found):
        place = Place(rank, rank, 2, 2, "127.0.0.1", port)
        removed = {"TORCHELASTIC_USE_AGENT_STORE": None}
        assert seen == {**place.variables(), "DS_ACCELERATOR": "cpu", **removed}
    log = job.log(0).read_text()
    assert "inherited RANK=3: set to 0" in log
    assert "inherited TORCHELASTIC_USE_AGENT_STORE=True: removed, left by torchrun" in log


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_local_rank_starts_with_the_variables_of_the_cluster_file(
    launch_job: Launch, local_plan: Plan
) -> None:
    job = launch_job(environment_at_start, num_ranks=1, env={"OMP_NUM_THREADS": "3"})
    (seen,) = results(job)
    assert {"OMP_NUM_THREADS=3", "DS_ACCELERATOR=cpu"} <= set(seen)
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] != "3"
    paths = local_plan.env["PYTHONPATH"].split(os.pathsep)
    assert {path.name for path in Path(paths[0]).iterdir()} == {"dist_vse"}


@pytest.mark.slow
def test_a_failed_rank_ends_the_job_and_is_named(
    launch_job: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    job = launch_job(fail_before_joining)
    assert follow(job, poll_s=0.05) == 2  # long before rank 0's ten minutes are over
    log = job.log(1)
    expected = f"error: job {job.job_id}, rank 1: streams are wrong; take 8 (log: {log})\n"
    assert capfd.readouterr().err == expected


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_is_named(
    launch_job: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    job = launch_job(die_after_joining)
    assert follow(job, poll_s=0.05) == 1
    first, second = capfd.readouterr().err.strip().splitlines()
    assert first.startswith(f"error: job {job.job_id}, rank 1: killed")
    assert "rank 0: RuntimeError" in second


def test_ctrl_c_asks_a_local_job_to_stop(
    launch_job: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    job = launch_job(partial(press_ctrl_c, os.getpid()), num_ranks=1)
    assert follow(job, poll_s=0.05) == 130
    assert "asked the job to save and exit" in capfd.readouterr().err


@pytest.mark.slow
def test_training_by_the_config_as_it_was_submitted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", {"train": [16, 16], "val": [8]})
    config_path = tmp_path / "run.yaml"
    config_path.write_text(
        f"{{output_dir: {tmp_path}/run, global_batch_size: 8, chunk_size: 2, total_steps: 3,"
        f" log_every: 1, data: {{index: {tmp_path}/data, num_streams: 4, num_workers: 0}},"
        " model: {embed_dim: 8, image: {name: test_vit, size: 32},"
        " text: {width: 64, depth: 1, max_tokens: 8}}}"
    )
    plan = plan_submission(config_path, ["seed=7"], CLUSTERS / "local.yaml")
    config_path.write_text("seed: 8\n")
    job = submit(plan)
    assert follow(job, poll_s=0.1) == 0
    assert load_config(tmp_path / "run" / "config.yaml").seed == 7
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]
    assert steps == [1, 2, 3]
    assert "step 3/3" in capfd.readouterr().out  # rank 0's log was followed


def test_the_batch_script_is_the_one_that_submitit_sends(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import submitit

    (tmp_path / "srun").touch(mode=0o755)  # submitit only looks whether there is one
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    plan = plan_submission(config_path, [], CLUSTERS / "slurm_8xa100.yaml")
    executor = submitit.SlurmExecutor(plan.job_folder, python=plan.python)
    executor.update_parameters(**plan.parameters)
    sent = executor._make_submission_file_text(executor._submitit_command_str, "")
    assert script(plan.spec, plan.parameters) == sent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "unknown key 'partitoin'; did you mean 'partition'?"),
        ("nodes: two", "nodes: "),
        ("nodes: 0", r"nodes \(0\) must be at least 1"),
        ("nodes: [", "no YAML"),
        ("scheduler: slrum", "did you mean 'slurm'?"),
        ("gpus_per_node: 4", r"processes_per_node \(1\) must equal gpus_per_node \(4\)"),
        ("time_min: 5", r"signal_before_end_s \(300\) must be above 0 and below 240"),
        ("env: {RANK: 0}", "env: RANK"),
        ("env: {A-B: 0}", "env: A-B is not a valid name for a variable"),
        ("{scheduler: local, nodes: 2}", r"nodes \(2\) must be 1 for local"),
        ("{scheduler: local, setup: [module load x]}", "run these lines in this shell"),
        ("{scheduler: local, container: docker run x}", "container .* is for Slurm only"),
        (
            "processes_per_node: 3",
            r"data.num_streams \(8\) must be a multiple of the world size \(3\)",
        ),
    ],
)
def test_wrong_cluster_files(config_path: Path, tmp_path: Path, text: str, message: str) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        plan_submission(config_path, [], cluster)
    assert "\n" not in str(caught.value)


def test_the_page_of_clusters_is_up_to_date() -> None:
    page = ROOT / "docs" / "reference" / "cluster.md"
    assert page.read_text() == document(), (
        "run python -m dist_vse.launch.document > docs/reference/cluster.md"
    )
    assert not [line for line in page.read_text().splitlines() if line.endswith("|  |")]


def test_slurm_that_is_not_here(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_submission(config_path, [], CLUSTERS / "slurm_cpu.yaml")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch and srun are not on PATH"):
        submit(plan)
    assert not plan.folder.exists()


def test_ports_differ_between_jobs_and_attempts() -> None:
    ports = {job_port(job_id, restarts) for job_id in range(100) for restarts in range(10)}
    assert len(ports) == 1000
    assert all(1024 < port < 32768 for port in ports)
    assert job_port(10**9, 10**4) < 32768


def test_conflicts_and_nesting() -> None:
    inherited = {"A": "1", "B": "2", "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": "/p"}
    wanted = {"A": "3", "B": "2", "C": "4", "PYTHONPATH": "/code:/p"}
    changed, removed = conflicts(inherited, wanted, several_nodes=False)
    assert (str(changed), changed.removed) == ("A=1: set to 3", False)
    assert str(removed) == "TORCHELASTIC_RUN_ID=x: removed, left by torchrun" and removed.removed
    outer = {"SLURM_NTASKS": "4", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "me"}
    assert nested_names(outer) == []
    assert nested_names({**outer, "SLURM_JOB_ID": "1"}) == ["SLURM_JOB_ID", "SLURM_NTASKS"]


def test_the_message_of_a_traceback() -> None:
    try:
        int("x")
    except ValueError:
        import traceback

        trace = traceback.format_exc()
    assert last_message(trace) == "ValueError: invalid literal for int() with base 10: 'x'"
    assert len(last_message("  at\n" + "y" * 1000)) < 500


def test_command_parses_without_heavy_imports() -> None:
    code = (
        "import argparse, sys; from dist_vse.launch import cli; p = argparse.ArgumentParser();"
        "cli.add_submit(p); a = p.parse_args(['c.yaml', 'seed=1', '--dry-run']);"
        "assert (a.config, a.overrides, a.dry_run) == ('c.yaml', ['seed=1'], True);"
        "print([m for m in ('torch', 'submitit', 'omegaconf', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
