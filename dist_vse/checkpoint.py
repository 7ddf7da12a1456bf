"""Checkpoints: a folder that appears by one rename, whole or not at all.

`checkpoints/step-000100/` holds `model.safetensors` (whole float32 weights, readable without
this package), `zero/` (DeepSpeed's weights and optimizer states), `rank-0.pt` ... (random
states), and `state.json` (step, data position, world size, ZeRO stage, sizes of all files).
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.engine.zero import ZeroEngine
from dist_vse.errors import UserError
from dist_vse.log import logger
from dist_vse.random_state import RandomState, random_state, restore

WEIGHTS = "model.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int
    samples_seen: int
    lanes: list[list[int]]  # (L, 2): epoch and position of every lane of the stream


def save(folder: Path, engine: ZeroEngine, progress: Progress, *, keep: int) -> None:
    """Write a checkpoint and remove all but the newest `keep`; every rank calls this."""
    final = folder / f"step-{progress.step:06d}"
    temporary = folder / f"{final.name}.tmp"
    if distributed.is_main_process():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    engine.save(temporary, "zero")
    state = random_state()
    torch.save({"cpu": state.cpu, "cuda": state.cuda}, temporary / _rank_file())
    with engine.whole_parameters():
        if distributed.is_main_process():
            save_file(_whole_weights(engine.module), temporary / WEIGHTS)
    distributed.barrier()
    if distributed.is_main_process():
        description = {
            **asdict(progress),
            "world_size": distributed.world_size(),
            "zero_stage": engine.stage,
            "files": _sizes(temporary),
        }
        (temporary / STATE).write_text(json.dumps(description, indent=1), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        for old in _steps(folder)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()


def load_latest(folder: Path, engine: ZeroEngine) -> Progress | None:
    """Load the newest whole checkpoint into the engine; return None if there is none.

    Every rank calls this, and all load the same one. Raises UserError if it was written by
    another number of processes or ZeRO stage.
    """
    path = distributed.broadcast_object(latest(folder) if distributed.is_main_process() else None)
    if path is None:
        return None
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    now = {"world_size": distributed.world_size(), "zero_stage": engine.stage}
    for name, value in now.items():
        if state[name] != value:
            raise UserError(
                f"{path}: was written with {name}={state[name]}, this run has {value}; resume with "
                f"{state[name]}, or start anew in another output_dir"
            )
    engine.load(path, "zero")
    saved = torch.load(path / _rank_file(), weights_only=True)
    restore(RandomState(saved["cpu"], saved["cuda"]))
    return Progress(state["step"], state["samples_seen"], state["lanes"])


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files all have their noted sizes."""
    for path in reversed(_steps(folder)):
        if _is_whole(path):
            return path
        logger.warning("%s: skipped, files are missing or cut", path)
    return None


def load_weights(path: Path, model: nn.Module) -> None:
    """Load the whole weights of a checkpoint's folder into a model.

    Raises UserError if they don't fit.
    """
    try:
        model.load_state_dict(load_file(path / WEIGHTS))
    except (RuntimeError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path / WEIGHTS}: doesn't fit the run's config ({reason})") from error


def _whole_weights(module: nn.Module) -> dict[str, Tensor]:
    # Cloned: safetensors refuses tensors that share memory, as tied weights do.
    return {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}


def _rank_file() -> str:
    return f"rank-{distributed.rank()}.pt"


def _steps(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _sizes(folder: Path) -> dict[str, int]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): p.stat().st_size for p in files}


def _is_whole(path: Path) -> bool:
    if not (path / STATE).is_file():
        return False
    noted = json.loads((path / STATE).read_text(encoding="utf-8"))["files"]
    found = _sizes(path)
    return all(found.get(name) == size for name, size in noted.items())
