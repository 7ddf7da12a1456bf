"""Training on the real cluster: two nodes of two processes equal one process."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dist_vse.launch.runs import find_runs, table
from dist_vse.launch.submit import plan_submission, submit
from dist_vse.launch.sweep import plan_sweep, submit_sweep
from tests.slurm.cluster import Cluster
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

CONFIG = ROOT / "configs" / "debug_cpu.yaml"
CLUSTER = ROOT / "configs" / "clusters" / "slurm_cpu.yaml"
STEPS = 20
SETTINGS = (f"total_steps={STEPS}", "log_every=1", "optim.name=sgd", "optim.lr=0.05")


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process on this machine, without a launcher."""
    run_dir = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "dist_vse.train", str(CONFIG), *_overrides(data, run_dir)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=100)
    return _losses(run_dir)


def _overrides(data: Path, run_dir: Path, *more: str) -> list[str]:
    return [f"data.index={data}", f"output_dir={run_dir}", *SETTINGS, *more]


def _losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.timeout(200)
def test_two_nodes_of_two_processes_learn_what_one_process_learns(
    cluster: Cluster, data: Path, alone: list[float], tmp_path: Path
) -> None:
    before = cluster.received("n1")
    job = submit(plan_submission(CONFIG, _overrides(data, tmp_path / "run"), CLUSTER))
    assert cluster.wait_for_end(job.job_id) == "COMPLETED", job.log(0).read_text()
    assert _losses(tmp_path / "run") == pytest.approx(alone, abs=1e-4)
    assert len(alone) == STEPS
    # Gradients of 20 steps crossed the network: 4 bytes for each of the parameters at least.
    size = (tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors").stat()
    assert cluster.received("n1") - before > STEPS * size.st_size // 2


@pytest.mark.timeout(200)
def test_accelerate_on_every_node_learns_the_same_in_two_attempts(
    cluster: Cluster, data: Path, alone: list[float], tmp_path: Path
) -> None:
    log = tmp_path / "job.log"
    environment: Mapping[str, str] = {"PROCESSES_PER_NODE": "2", "DS_ACCELERATOR": "cpu"}
    bin_dir = Path(sys.executable).parent
    sent = subprocess.run(
        [
            "sbatch",
            "--parsable",
            f"--output={log}",
            "configs/clusters/accelerate.sbatch",
            str(CONFIG),
            *_overrides(data, tmp_path / "run"),
        ],
        cwd=ROOT,
        env={**os.environ, **environment, "PATH": f"{bin_dir}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    job_id = sent.stdout.strip()
    wait_until((tmp_path / "run" / "config.yaml").exists, "the start")
    cluster("scancel", "--signal=USR2", job_id)  # as before the time limit
    assert cluster.wait_for_end(job_id) == "COMPLETED", log.read_text()
    assert cluster.job(job_id, "Restarts") == "1"
    assert _losses(tmp_path / "run") == pytest.approx(alone, abs=1e-4)


@pytest.mark.timeout(240)
def test_a_sweep_of_four_is_one_array(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("{scheduler: slurm, time_min: 10, mem_gib: 1, env: {DS_ACCELERATOR: cpu}}")
    base = _overrides(data, tmp_path / "sweep", "total_steps=2")
    axes = ["optim.lr=1e-2,5e-2", "loss.name=convse,convse++"]
    plans = plan_sweep(CONFIG, base, axes, path)
    jobs = list(submit_sweep(plans, parallel=2))
    array = {job.job_id.split("_")[0] for job in jobs}
    assert len(jobs) == 4 and len(array) == 1
    for job in jobs:
        assert cluster.wait_for_end(job.job_id) == "COMPLETED", job.log(0).read_text()
    head, *rows = table(find_runs([tmp_path / "sweep"])).splitlines()
    assert head.split()[:5] == ["run", "loss.name", "optim.lr", "state", "step"]
    cells = sorted(row.split()[1:5] for row in rows)
    losses = ("convse", "convse++")
    assert cells == [[loss, lr, "completed", "2/2"] for loss in losses for lr in ("0.01", "0.05")]
