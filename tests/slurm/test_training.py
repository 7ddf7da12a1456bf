"""Training on the real cluster: two nodes of two processes equal one process."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch.submit import plan_submission, submit
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
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
    assert cluster.wait_for_end(job.job_id) == "COMPLETED", job.task(0).stderr()
    assert _losses(tmp_path / "run") == pytest.approx(alone, abs=1e-4)
    assert len(alone) == STEPS
    # Gradients of 20 steps crossed the network: 4 bytes for each of the parameters at least.
    size = (tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors").stat()
    assert cluster.received("n1") - before > STEPS * size.st_size // 2


@pytest.mark.timeout(200)
def test_accelerate_on_every_node_learns_the_same(
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
    assert cluster.wait_for_end(sent.stdout.strip()) == "COMPLETED", log.read_text()
    assert _losses(tmp_path / "run") == pytest.approx(alone, abs=1e-4)
