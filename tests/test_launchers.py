"""Four launchers, one result; and what a launcher's own DeepSpeed settings contradict is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_vse.builders import launcher_conflicts
from dist_vse.config import load_config
from dist_vse.errors import UserError
from launch.environment import free_port
from tests.datasets import write_dataset

ROOT = Path(__file__).parents[1]
CONFIG = "configs/debug_cpu.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, {"train": [64], "val": [16]})
    return folder


def _launch(run_dir: Path, data: Path, *launcher: str) -> tuple[list[float], str]:
    """Train three steps in two processes; return the losses and what was said."""
    settings = ["total_steps=3", "log_every=1", f"data.index={data}", f"output_dir={run_dir}"]
    bin_dir = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*launcher, CONFIG, *settings],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"], done.stderr


@pytest.mark.timeout(300)
def test_every_launcher_gives_the_same_losses(data: Path, tmp_path: Path) -> None:
    deepspeed = tmp_path / "deepspeed.json"
    theirs = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    deepspeed.write_text(json.dumps(theirs))
    accelerate = tmp_path / "accelerate.yaml"
    accelerate.write_text(
        "{compute_environment: LOCAL_MACHINE, distributed_type: DEEPSPEED, num_machines: 1,"
        " num_processes: 2, machine_rank: 0, use_cpu: false, debug: false,"
        f" deepspeed_config: {{deepspeed_config_file: {deepspeed}}}}}"
    )
    port = str(free_port())
    launchers = {
        "torchrun": ("torchrun", "--nproc_per_node=2", f"--master_port={port}", "-m"),
        "deepspeed": ("deepspeed", "--num_gpus=2", f"--master_port={port}", "--module"),
        "accelerate": ("accelerate", "launch", f"--config_file={accelerate}", "-m"),
    }
    results = {
        name: _launch(tmp_path / name, data, *command, "dist_vse.train")
        for name, command in launchers.items()
    }
    losses, _ = results["torchrun"]
    assert len(losses) == 3
    assert all(found == losses for found, _ in results.values())
    told = "the launcher asks DeepSpeed for zero_optimization.stage=3, the run has 1"
    assert [told in said for _, said in results.values()] == [False, False, True]


def test_a_launchers_contradictions_are_told(tmp_path: Path) -> None:
    config = load_config(ROOT / CONFIG)
    path = tmp_path / "deepspeed.json"
    theirs = {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": "auto",
        "train_batch_size": 32,
        "fp16": {"enabled": True},
        "optimizer": {"type": "Adam"},
    }
    path.write_text(json.dumps(theirs))
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
    }
    start = "the launcher asks DeepSpeed for "
    assert launcher_conflicts(config, environment) == [
        f"{start}fp16.enabled=true, the run has false; set engine.precision in its config",
        f"{start}gradient_clipping=1.0, the run has 0.0; set optim.clip_norm in its config",
        f"{start}optimizer.type=Adam, the run does without",
        f"{start}zero_optimization.offload_optimizer.device=cpu, the run does without",
    ]
    assert launcher_conflicts(config, {}) == []
    given = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
    assert launcher_conflicts(config, given) == []  # accelerate's default, nobody's wish
    (told,) = launcher_conflicts(config, {**given, "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage"})
    assert told.startswith(f"{start}zero_optimization.stage=2, the run has 1")
    path.write_text("{")
    with pytest.raises(UserError, match="the launcher's DeepSpeed config"):
        launcher_conflicts(config, environment)
