"""Check 11: the same step gives the same numbers, and a resumed run goes on as if never stopped."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.launch.gpu_checks.workload import (
    Rig,
    build_rig,
    made_up_batch,
    reference_config,
    small_config,
)
from dist_vse.runs.checkpoint import Progress, load_latest
from dist_vse.runs.lease import acquire
from dist_vse.runs.saver import Saver

STEPS, MORE = 2, 2  # before the checkpoint, and after it
ROWS = 256  # pairs a rank: enough for several tiles
CLOSE = 1e-3  # of all weights' movement; a run that lost its state is far off


def check_determinism(task: Task) -> Finding:
    """Train twice from the same start, the second time through a checkpoint; compare the bits."""
    config = _config(task)
    rig = build_rig(config)
    start = _weights(rig)
    _train(rig, 0, STEPS)
    folder = Path(task.folder, "checkpoints")
    folder.mkdir()
    saver = Saver(folder, acquire(Path(task.folder)), keep_last=1, keep_best=0, minutes=0)
    saver.start(rig.engine, Progress(STEPS, 0, []), score=None)
    saver.finish()
    _train(rig, STEPS, MORE)
    whole = _weights(rig)

    again = build_rig(config)
    _train(again, 0, STEPS)
    _train(again, STEPS, MORE)
    resumed = build_rig(config)
    progress = load_latest(folder, resumed.engine)
    if progress is None or progress.step != STEPS:
        return Finding(False, "the checkpoint was not found again")
    _train(resumed, STEPS, MORE)

    moved = _distance(whole, start)
    figures: dict[str, object] = {}
    words, near = [], True
    for name, other in (("repeated", _weights(again)), ("resumed", _weights(resumed))):
        different = [key for key in whole if not torch.equal(whole[key], other[key])]
        gap = _distance(whole, other) / moved
        figures[name] = {"different": different, "gap": gap}
        near = near and gap < CLOSE
        equal = (
            "equal to the bit"
            if not different
            else (f"{len(different)} of {len(whole)} tensors differ, by {gap:.0e} of the movement")
        )
        words.append(f"{name}: {equal}")
    # A GPU promises no bits: which tensors differ is for the JSON.
    exact = all(not figure["different"] for figure in figures.values())  # type: ignore[index]
    return Finding(near and (exact or task.on_gpu), "; ".join(words), figures)


def compile_step(task: Task) -> Finding:
    """Compile the kernels of check 11's steps."""
    build_rig(_config(task)).step()
    return Finding(True, "")


def _config(task: Task) -> TrainConfig:
    config = reference_config(task)
    if task.config is not None or not task.on_gpu:
        return config
    small = small_config(global_batch_size=ROWS * distributed.world_size(), chunk_size=ROWS // 4)
    return replace(small, engine=config.engine)


def _train(rig: Rig, first: int, count: int) -> None:
    """Take steps on batches of their own; dropout draws by the step's number."""
    rows = len(rig.batch.images)
    for step in range(first, first + count):
        torch.manual_seed(step)
        replace(rig, batch=made_up_batch(rig.config, rows, seed=step)).step()


def _weights(rig: Rig) -> dict[str, Tensor]:
    with rig.engine.gathered_parameters() as model:
        named = model.named_parameters()
        return {name: p.detach().float().cpu().clone() for name, p in named}


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(torch.stack([(a[name] - b[name]).norm() for name in a]).norm())
