"""A run that writes down every sample it trains on, and waits where a test wants to break it."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vse.launch.job import Train


@dataclass(frozen=True)
class RecordedTrain:
    """Trains as a submitted job does, and records beside it."""

    train: Train
    folder: str

    def __call__(self) -> int:
        """Train; return the exit code."""
        from dist_vse import distributed, train

        real, folder = train.build_train_batches, Path(self.folder)
        build_loss = train.build_loss

        def poisoned(config: Any, batch: Any, samples_seen: int) -> Any:
            loss = build_loss(config, batch, samples_seen)
            step = samples_seen // config.global_batch_size + 1
            if distributed.rank() == 1 and (folder / f"poison-{step}").exists():
                return _Infinite(loss)
            return loss

        def recorded(*args: Any) -> Iterator[Any]:
            rank, start = distributed.rank(), args[-1].step
            for step, batch in enumerate(real(*args), start + 1):
                with (folder / f"samples-{rank}.jsonl").open("a") as file:
                    origin = sorted(batch.origin.tolist())
                    file.write(json.dumps({"step": step, "origin": origin}) + "\n")
                pause = folder / f"pause-{step}"
                if pause.exists():
                    with (folder / f"reached-{step}").open("a") as file:
                        file.write(f"{rank}\n")
                while pause.exists():
                    time.sleep(0.02)
                yield batch

        train.build_train_batches = recorded  # type: ignore[assignment]
        train.build_loss = poisoned
        return self.train()


class _Infinite:
    """A loss that is not finite."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.prefetch = loss, loss.prefetch

    def __call__(self, *outputs: Any) -> Any:
        output = self.loss(*outputs)
        return output._replace(loss=output.loss * float("inf"))


def pause_at(folder: Path, step: int) -> None:
    """Have every rank wait before this step until `release`."""
    (folder / f"pause-{step}").touch()


def hold_python(folder: Path) -> Path:
    """Return a file: Python waits for it before its first import, if its folder is on the path."""
    gate = folder / "gate" / "open"
    gate.parent.mkdir()
    wait = f"import os, time\nwhile not os.path.exists({str(gate)!r}):\n    time.sleep(0.1)\n"
    (gate.parent / "sitecustomize.py").write_text(wait)
    return gate


def poison(folder: Path, step: int) -> Path:
    """Have rank 1's loss be infinite at this step for as long as the returned file is there."""
    path = folder / f"poison-{step}"
    path.touch()
    return path


def num_waiting(folder: Path, step: int) -> int:
    """Return how many ranks, of all attempts, have come to the pause."""
    path = folder / f"reached-{step}"
    return len(path.read_text().splitlines()) if path.exists() else 0


def release(folder: Path, step: int) -> None:
    """Let the ranks go on."""
    (folder / f"pause-{step}").unlink()


def samples_trained_on(folder: Path) -> list[tuple[int, int]]:
    """Return (epoch, sample) of all steps; of a step that was repeated, the last time counts."""
    trained: list[tuple[int, int]] = []
    for path in sorted(folder.glob("samples-*.jsonl")):
        lines = map(json.loads, path.read_text().splitlines())
        steps = {line["step"]: line["origin"] for line in lines}
        trained += [tuple(origin) for step in steps.values() for origin in step]
    return trained
