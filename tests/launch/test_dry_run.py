"""`submit --dry-run`: its whole text for each shipped cluster, and every conflict by its name.

The texts are files in tests/launch/golden; `python -m tests.launch.test_dry_run` rewrites them.
"""

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.launch.dry_run import dry_run, find_conflicts
from dist_vse.launch.submit import Plan, plan_submission
from tests.support.paths import ROOT

GOLDEN = ROOT / "tests" / "launch" / "golden"
CLUSTERS = {path.stem: path for path in sorted((ROOT / "configs" / "clusters").glob("*.yaml"))}
CLUSTERS["every_option"] = GOLDEN / "every_option.yaml"
BATCH = ["global_batch_size=1024", "chunk_size=32", "data.num_streams=32"]


def _plan(cluster: Path, folder: Path, inherited: Mapping[str, str] | None = None) -> Plan:
    run = [*BATCH, f"output_dir={folder}/run"]
    return plan_submission(ROOT / "configs/debug_cpu.yaml", run, cluster, inherited=inherited or {})


def _text(cluster: Path, folder: Path) -> str:
    """Return what a dry run prints in an empty shell, without what differs between machines."""
    plan = _plan(cluster, folder)
    text = dry_run(plan, inherited={})
    names = {
        plan.code.name: "code-DIGEST",
        plan.config_path.name: "config-DIGEST.yaml",
        str(folder): "/shared",
        sys.executable: "/venv/bin/python",
    }
    for name, placeholder in names.items():
        text = text.replace(name, placeholder)
    return text + "\n"


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_whole_text(name: str, tmp_path: Path) -> None:
    text = _text(CLUSTERS[name], tmp_path)
    assert text == (GOLDEN / f"{name}.txt").read_text()
    script = text.split("\nconfig:")[0]
    if script.startswith("#!/bin/bash"):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_one_array(tmp_path: Path) -> None:
    plan = _plan(CLUSTERS["slurm_cpu"], tmp_path)
    lines = dry_run(plan, runs=6, parallel=4, inherited={}).splitlines()
    assert "#SBATCH --array=0-5%4" in lines
    assert f"#SBATCH --output={tmp_path}/run/submit/%A_%a/%A_%a_0_log.out" in lines


def test_a_job_that_may_not_be_queued_again(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{scheduler: slurm, requeue: false}")
    lines = dry_run(_plan(cluster, tmp_path), inherited={}).splitlines()
    assert "#SBATCH --no-requeue" in lines and "#SBATCH --requeue" not in lines
    cluster.write_text("{scheduler: slurm, requeue: false, failures: 1}")
    with pytest.raises(UserError, match=r"failures \(1\) needs requeue: true"):
        _plan(cluster, tmp_path)


CONFLICTS = {
    "RANK=0": "every rank gets its own",
    "LOCAL_RANK=1": "every rank gets its own",
    "WORLD_SIZE=4": "every rank gets its own",
    "LOCAL_WORLD_SIZE=4": "every rank gets its own",
    "MASTER_ADDR=n7": "every rank gets its own",
    "MASTER_PORT=29500": "every rank gets its own",
    "TORCHELASTIC_RUN_ID=none": "removed, left by torchrun",
    "GROUP_RANK=0": "removed, left by torchrun",
    "ROLE_RANK=0": "removed, left by torchrun",
    "ACCELERATE_MIXED_PRECISION=bf16": "removed, left by accelerate",
    "CROSS_RANK=0": "removed, left by deepspeed",
    "DIST_VSE_HANG_S=5": "set to 1800",
    "DS_ACCELERATOR=cpu": "set to cuda",
    "GLOO_SOCKET_IFNAME=lo": "removed, it reaches no other node",
    "NCCL_SOCKET_IFNAME=lo": "removed, it reaches no other node",
    "OMP_NUM_THREADS=1": "kept, though cpus_per_process is 12",
    "CUDA_VISIBLE_DEVICES=0,1": "Slurm sets the 8 GPUs of each node",
    "SLURM_JOB_ID=5": "removed, set by the Slurm job around this shell",
    "SRUN_DEBUG=3": "removed, set by the Slurm job around this shell",
    "SBATCH_TIMELIMIT=5": "removed, the cluster file sets it",
    "SBATCH_MEM_PER_CPU=1G": "removed, the cluster file sets it",
    "SBATCH_NO_REQUEUE=1": "removed, the cluster file sets it",
    "SBATCH_PARTITION=gpu": "kept for sbatch",
}


@pytest.mark.parametrize(("variable", "action"), CONFLICTS.items(), ids=CONFLICTS)
def test_every_conflict_is_named(variable: str, action: str, tmp_path: Path) -> None:
    name, _, value = variable.partition("=")
    inherited = {name: value, "HOME": "/root", "SLURM_CONF": "/etc/s", "DIST_VSE_CACHE": "/c"}
    if name.startswith("SRUN_"):
        inherited["SLURM_JOB_ID"] = "5"
    plan = _plan(CLUSTERS["slurm_8xh100"], tmp_path, inherited)
    found = find_conflicts(plan, inherited)
    assert f"{variable}: {action}" in found
    others = [line for line in found if not line.startswith((f"{name}=", "SLURM_JOB_ID="))]
    assert all(line.startswith("two launchers: ") for line in others)
    assert f"  {variable}: {action}" in dry_run(plan, inherited=inherited).splitlines()


@pytest.mark.parametrize(
    ("variable", "launcher"),
    [
        ("TORCHELASTIC_RUN_ID=x", "torchrun"),
        ("ACCELERATE_USE_CPU=False", "accelerate"),
        ("CROSS_SIZE=1", "deepspeed"),
        ("OMPI_COMM_WORLD_SIZE=2", "mpirun"),
        ("SLURM_STEP_NUM_TASKS=2", "srun"),
    ],
)
def test_a_launcher_around_submit_is_named(variable: str, launcher: str, tmp_path: Path) -> None:
    inherited = dict([variable.split("=")])
    found = find_conflicts(_plan(CLUSTERS["local"], tmp_path, inherited), inherited)
    assert found[0].startswith(f"two launchers: {launcher} started this shell")


def test_local_ranks_and_the_gpus_that_are_visible(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{scheduler: local, processes_per_node: 2, gpus_per_node: 2}")
    inherited = {"CUDA_VISIBLE_DEVICES": "4,5,6", "GLOO_SOCKET_IFNAME": "eth0"}
    plan = _plan(cluster, tmp_path, inherited)
    assert find_conflicts(plan, inherited) == [
        "CUDA_VISIBLE_DEVICES=4,5,6: set to 4,5",
        "GLOO_SOCKET_IFNAME=eth0: set to lo",
    ]
    for visible, number in (("4", 1), ("", 0), ("4,-1,5", 1)):
        message = rf"gpus_per_node \(2\) is more than the {number} of CUDA_VISIBLE_DEVICES="
        with pytest.raises(UserError, match=message):
            _plan(cluster, tmp_path, {"CUDA_VISIBLE_DEVICES": visible})


def test_local_processes_have_no_limit_and_list_what_they_ignore(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{scheduler: local, time_min: 10, partition: gpu, mem_gib: 0}")
    plan = _plan(cluster, tmp_path)
    assert plan.parameters["timeout_min"] > 60 * 24 * 365
    found = "ignored by scheduler local: mem_gib=0, partition=gpu, time_min=10"
    assert dry_run(plan, inherited={}).splitlines()[-1] == found
    assert "ignored by" not in dry_run(_plan(CLUSTERS["local"], tmp_path), inherited={})
    assert "ignored by" not in dry_run(_plan(CLUSTERS["slurm_cpu"], tmp_path), inherited={})


def test_the_ranks_ignore_early_signals_through_a_container(tmp_path: Path) -> None:
    """Run the printed command with a rank that is asked to stop before it listens."""
    plan = _plan(CLUSTERS["every_option"], tmp_path)
    plan.code.mkdir(parents=True)
    command = plan.python.replace("apptainer exec --nv vse.sif", "env INSIDE=1")
    command = command.replace("python3", sys.executable)
    program = (
        "import os, signal;"
        "[os.kill(os.getpid(), n) for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)];"
        "print(os.environ['INSIDE'], os.getcwd())"
    )
    done = subprocess.run(f"{command} -c {shlex.quote(program)}", shell=True, capture_output=True)
    assert done.stdout.decode() == f"1 {plan.code}\n", done.stderr


if __name__ == "__main__":
    for name, path in CLUSTERS.items():
        with tempfile.TemporaryDirectory() as folder:
            (GOLDEN / f"{name}.txt").write_text(_text(path, Path(folder)))


def test_a_name_that_schedulers_would_change_is_refused() -> None:
    with pytest.raises(UserError, match="schedulers replace %"):
        plan_submission(ROOT / "configs/debug_cpu.yaml", ["output_dir=runs/%j"], None)
