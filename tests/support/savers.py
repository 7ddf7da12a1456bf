"""Real savers, and what they save: engines of a small model, and a stand-in that starts quickly."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.config import OptimConfig
from dist_vse.engine import RunEngine
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.runs import lease
from dist_vse.runs.checkpoint import Progress
from dist_vse.runs.saver import Saver
from dist_vse.training.grad_cache import train_step
from tests.support.engines import build
from tests.support.tiny import tiny_batch, tiny_model

B = 16  # rows of a global batch


def build_engine(stage: int, name: str = "adamw", average_samples: int = 0) -> RunEngine:
    """Build the engine of a stage (see `engines.build`); its image trunk is frozen."""
    model = tiny_model()
    for parameter in model.image.trunk.parameters():
        parameter.requires_grad_(False)  # DeepSpeed's own export forgets frozen towers
    optim = OptimConfig(name=name, lr=0.01, weight_decay=0.1, momentum=0.9)
    optimizer = build_optimizer(model, optim)
    return build(model, optimizer, stage, batch_size=B, average_samples=average_samples)


def take_step(engine: RunEngine, step: int) -> None:
    """Train on this rank's rows of the step's batch."""
    rank, rows = distributed.rank(), B // distributed.world_size()
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, step))
    chunk = engine.module.prepare(images=images, tokens=tokens)
    train_step(engine, GlobalLoss("convse"), [chunk])


def open_saver(
    folder: Path, *, keep_last: int = 2, keep_best: int = 0, minutes: float = 0
) -> Saver:
    """Claim the folder for all ranks, as a new attempt of a run does."""
    held = lease.acquire(folder) if distributed.is_main_process() else None
    held = distributed.broadcast_object(held)
    return Saver(folder, held, keep_last=keep_last, keep_best=keep_best, minutes=minutes)


class TellingEngine:
    """What a saver asks of an engine, quick to start; every number in it is the step."""

    stage = 1

    def __init__(self) -> None:
        self.module = torch.nn.Linear(500, 500)

    def tell(self, step: int) -> None:
        self.step = step
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.fill_(step)

    def dump_optimizer(self) -> dict[str, Tensor]:
        return {"optim/a/0": torch.full((250_000,), float(self.step))}

    def gathered_parameters(self) -> Any:
        return contextlib.nullcontext(self.module)

    def load(self, weights: dict[str, Tensor], files: Sequence[Path]) -> None:
        self.step = int(weights["bias"][0])


def save_steps(folder: Path, *steps: int, keep_best: int = 0) -> None:
    """Save as one attempt of a run does, keeping two."""
    engine, saver = TellingEngine(), open_saver(folder, keep_best=keep_best)
    for step in steps:
        engine.tell(step)
        saver.start(engine, Progress(step, step, []), score=1.0 / step)  # type: ignore[arg-type]
        saver.finish()


def folder_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())
