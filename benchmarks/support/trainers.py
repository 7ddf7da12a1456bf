"""The two trainers, each with its own command line, given the same task."""

import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import import_path
from benchmarks.support.run_training import TrainingRun, run_training
from benchmarks.support.trainer_data import CONTEXT, MODEL, Model, tar_paths
from dist_vse.data.index import read_index

OURS, PEER = "dist_vse", "OpenCLIP"
LEARNING_RATE, WEIGHT_DECAY, BETAS = 5e-4, 0.2, (0.9, 0.98)
MIN_CROP_AREA = 0.9  # OpenCLIP's default
STREAMS = 8
OUR_STEP = re.compile(r"\bstep +\d+/\d+ ")
PEER_STEP = re.compile(r"\bTrain Epoch: ")
READ_AHEAD = 2  # batches a worker: PyTorch's default, which OpenCLIP keeps


@dataclass(frozen=True)
class Setting:
    """What does not change between two tasks."""

    folder: Path  # what `trainer_data.write_data` made
    model: Model
    processes: int
    workers: int  # a process
    timeout_s: float  # of a training


@dataclass(frozen=True)
class Task:
    """The first steps of a training that would go on: its last ones would read nothing any more."""

    trainer: str
    global_batch: int
    chunks: int  # a rank; 1 is without caching
    steps: int
    keep_graphs: int | str = 1  # ours alone

    def total_steps(self, setting: Setting) -> int:
        """Return how many steps the training is set to take."""
        return self.steps + READ_AHEAD * max(1, setting.workers) + 1


def train(setting: Setting, task: Task) -> TrainingRun:
    """Run one training under torchrun, in a folder that is removed at its end.

    Raises UserError if it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        ours = task.trainer == OURS
        program = _our_program(setting, task, cwd) if ours else _peer_program(setting, task)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        return run_training(
            [sys.executable, *launcher, str(setting.processes), "-m", "--", *program],
            OUR_STEP if ours else PEER_STEP,
            steps=task.steps,
            cwd=cwd,
            environment=_environment(),
            timeout_s=setting.timeout_s,
        )


def write_our_config(path: Path, setting: Setting, task: Task) -> None:
    """Write our config of a task; what it leaves out is our default."""
    model = setting.model
    shards = read_index(setting.folder / "train")
    samples = shards.split("train").num_samples
    config = {
        "output_dir": "run",
        "global_batch_size": task.global_batch,
        "chunk_size": task.global_batch // setting.processes // task.chunks,
        "total_steps": task.total_steps(setting),
        "log_every": 1,
        "data": {
            "index": str(setting.folder / "val"),
            "eval_split": "train",  # of val/
            # OpenCLIP goes through its shards again where an epoch wants more samples.
            "mix": [{"index": str(shards.root), "weight": -(-task.global_batch // samples)}],
            "num_streams": STREAMS,
            "num_workers": setting.workers,
            "min_crop_area": MIN_CROP_AREA,
        },
        "model": {
            "embed_dim": model.dim,
            "image": {"name": model.image, "size": model.size},
            "text": {
                "kind": "transformer",
                "width": model.text_width,
                "depth": model.text_depth,
                "max_tokens": CONTEXT,
            },
        },
        "cache": {"keep_graphs": task.keep_graphs},
        "loss": {"name": "info_nce", "temperature": 0.07, "learn_temperature": True},
        "optim": {
            "lr": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "schedule": "cosine",
        },
    }
    path.write_text(json.dumps(config), encoding="utf-8")  # which is YAML as well


def _our_program(setting: Setting, task: Task, cwd: Path) -> list[str]:
    path = cwd / "config.yaml"
    write_our_config(path, setting, task)
    return ["dist_vse.train", str(path)]


def _peer_program(setting: Setting, task: Task) -> list[str]:
    paths = tar_paths(setting.folder)
    samples = read_index(setting.folder / "train").split("train").num_samples
    # A worker of OpenCLIP's drops what fills no batch at the end of its shards: name them as often
    # as its share of all makes a batch.
    wanted = task.global_batch // task.chunks * max(1, setting.workers)
    options = {
        "model": MODEL,
        "force-image-size": setting.model.size,
        "train-data": "::".join(paths * -(-wanted // samples)),
        "dataset-type": "webdataset",
        "train-num-samples": task.global_batch * task.total_steps(setting),
        "epochs": 1,
        "batch-size": task.global_batch // setting.processes // task.chunks,
        "accum-freq": task.chunks,
        "workers": setting.workers,
        "precision": "fp32",
        "device": "cpu",
        "lr": LEARNING_RATE,
        "wd": WEIGHT_DECAY,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "warmup": 0,
        "log-every-n-steps": 1,
        "logs": "none",  # and no checkpoint
        "name": "run",
    }
    pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    flags = ["--local-loss", "--gather-with-grad"]  # without them its gradient is another
    return ["benchmarks.support.open_clip_main", str(setting.folder / "peer"), *pairs, *flags]


def _environment() -> dict[str, str]:
    return (
        os.environ
        | import_path()
        | {
            "OMP_NUM_THREADS": "1",  # torchrun's own choice, which it would warn about
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
    )
