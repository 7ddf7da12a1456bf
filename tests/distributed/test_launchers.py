"""Four ways to start, one result; and what a launcher's own settings contradict is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.launch.environment import free_port
from dist_vse.training.build_engine import launcher_conflicts
from tests.support.datasets import write_dataset
from tests.support.runs import ROOT, command, read_losses

CONFIG = "configs/debug_cpu.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, {"train": [64], "val": [16]})
    return folder


def _launch(run_dir: Path, data: Path, *launcher: str) -> tuple[list[float], bytes, str]:
    """Train three steps in two processes; return losses, final weights and what was said."""
    settings = ["total_steps=3", "log_every=1", f"data.index={data}", f"output_dir={run_dir}"]
    done = command(*launcher, CONFIG, *settings)
    assert done.returncode == 0, done.stderr
    weights = (run_dir / "checkpoints" / "step-000003" / "model.safetensors").read_bytes()
    return read_losses(run_dir), weights, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_way_to_start_gives_the_same_weights(data: Path, tmp_path: Path) -> None:
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
    train, cluster = "dist_vse.train", "--cluster=configs/clusters/local.yaml"
    launchers = {
        "torchrun": ("torchrun", "--nproc_per_node=2", f"--master_port={port}", "-m", train),
        # This one gives every rank its --local_rank=N behind the module.
        "deepspeed": ("deepspeed", "--num_gpus=2", f"--master_port={port}", "--module", train),
        "accelerate": ("accelerate", "launch", f"--config_file={accelerate}", "-m", train),
        "submit": ("dist-vse", "submit", "--wait", cluster),
    }
    results = {
        name: _launch(tmp_path / name, data, *command) for name, command in launchers.items()
    }
    losses, weights, _ = results["torchrun"]
    assert len(losses) == 3
    for name, (found, final, _) in results.items():
        assert (found, final) == (losses, weights), name
    told = "the launcher asks DeepSpeed for zero_optimization.stage=3, the run has 1"
    assert [told in said for *_, said in results.values()] == [False, False, True, False]


def _conflicts(tmp_path: Path, theirs: object, *overrides: str) -> list[str]:
    """Return what a DeepSpeed file contradicts of a debug run of two processes."""
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(theirs))
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
    }
    return launcher_conflicts(load_config(ROOT / CONFIG, overrides), environment)


def test_a_file_that_describes_the_run_contradicts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    adam = {"lr": 2e-3, "weight_decay": 0.01, "betas": [0.9, 0.999], "eps": 1e-8}
    theirs: dict[str, Any] = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": adam},
        "fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2, "initial_scale_power": 16},
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "zero_optimization": {"stage": 1, "allgather_partitions": True, "reduce_scatter": True},
    }
    assert _conflicts(tmp_path, theirs) == []
    auto = _conflicts(tmp_path, theirs, "chunk_size=auto")
    assert auto == []  # what fits is tried later
    assert _conflicts(tmp_path, {**theirs, "gradient_accumulation_steps": 1}) == []
    start = "the launcher asks DeepSpeed for "
    assert _conflicts(tmp_path, theirs, "chunk_size=16") == [
        f"{start}gradient_accumulation_steps=2, the run has 1; set chunk_size in its config",
        f"{start}train_micro_batch_size_per_gpu=8, the run has 16; set chunk_size in its config",
    ]
    other = {"params": {**adam, "betas": [0.9, 0.98], "eps": 1e-6}}
    assert _conflicts(
        tmp_path, {"optimizer": other, "fp16": {"enabled": True, "hysteresis": 2}}
    ) == [
        f"{start}fp16.enabled=true, the run has false; set engine.precision in its config",
        f"{start}fp16.hysteresis=2, the run does without",
        f"{start}optimizer.params.betas=[0.9, 0.98], the run has [0.9, 0.999]; set optim.beta1 and "
        "optim.beta2 in its config",
        f"{start}optimizer.params.eps=1e-06, the run has 1e-08",
    ]


def test_a_launchers_contradictions_are_told(tmp_path: Path) -> None:
    config = load_config(ROOT / CONFIG)
    path = tmp_path / "deepspeed.json"
    theirs = {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": "auto",
        "train_batch_size": 32,
        "fp16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": "auto", "weight_decay": 0.5}},
        "steps_per_print": 100,
        "wall_clock_breakdown": False,
        "amp": {"enabled": False},
        "activation_checkpointing": {"number_checkpoints": 4},
    }
    path.write_text(json.dumps(theirs))
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
    }
    start = "the launcher asks DeepSpeed for "
    assert launcher_conflicts(config, environment) == [
        f"{start}activation_checkpointing.number_checkpoints=4, the run does without",
        f"{start}fp16.enabled=true, the run has false; set engine.precision in its config",
        f"{start}gradient_clipping=1.0, the run has 0.0; set optim.clip_norm in its config",
        f"{start}optimizer.params.weight_decay=0.5, the run has 0.01; set optim.weight_decay in "
        "its config",
        f"{start}optimizer.type=Adam, the run has adamw; set optim.name in its config",
        f"{start}zero_optimization.offload_optimizer.device=cpu, the run does without",
    ]
    assert launcher_conflicts(config, {}) == []
    given = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
    assert launcher_conflicts(config, given) == []  # accelerate's default, nobody's wish
    (told,) = launcher_conflicts(config, {**given, "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage"})
    assert told.startswith(f"{start}zero_optimization.stage=2, the run has 1")
    asked = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }
    assert launcher_conflicts(config, asked) == [
        "the launcher asks for mixed precision bf16, the run has fp32; set engine.precision in its "
        "config",
        "the launcher asks for FSDP, the run has DeepSpeed's ZeRO; set engine.name in its config",
        "the launcher asks for dynamo backend inductor, the run does without; set model.compile in "
        "its config",
    ]
    fsdp2 = load_config(ROOT / CONFIG, ["engine.name=fsdp2", "engine.zero_stage=3"])
    assert launcher_conflicts(fsdp2, {"ACCELERATE_USE_FSDP": "true"}) == []
    bf16 = load_config(ROOT / CONFIG, ["engine.precision=bf16"])
    assert launcher_conflicts(bf16, {"ACCELERATE_MIXED_PRECISION": "bf16"}) == []
    path.write_text("{")
    with pytest.raises(UserError, match="the launcher's DeepSpeed config"):
        launcher_conflicts(config, environment)
