"""The skipped_log of a run's bad samples: which were left out, why, and how many may be."""

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from dist_vse import distributed
from dist_vse.common.errors import UserError, writing
from dist_vse.data.samples import Skipped
from dist_vse.runs.files import drop_lines_after


class SkippedLog:
    """Collects every rank's bad samples in one file, and ends the run where they are too many."""

    def __init__(self, path: Path, start_step: int, *, share: float, per_epoch: int) -> None:
        """Go on after `start_step`; an epoch of `per_epoch` samples may have `share` bad ones."""
        self._path, self._share, self._per_epoch = path, share, per_epoch
        self._pending: list[tuple[int, Skipped]] = []
        lines: list[str] = []
        with distributed.raise_on_all_ranks(), writing(path):
            if distributed.is_main_process():
                lines = drop_lines_after(path, start_step)
        epochs = [json.loads(line)["epoch"] for line in lines]
        self._bad: Counter[int] = Counter(distributed.broadcast_object(epochs))  # by epoch

    def add(self, step: int, skipped: tuple[Skipped, ...]) -> None:
        """Note what this rank left out on the way to a step's batch."""
        self._pending += [(step, sample) for sample in skipped]

    def flush(self) -> None:
        """Write what all ranks noted since the last time; every rank calls this.

        Raises UserError, alike on every rank, if an epoch has too many bad samples, or if the file
        can't be written.
        """
        if not distributed.any_rank(bool(self._pending)):
            return
        noted = [
            entry for entries in distributed.all_gather_object(self._pending) for entry in entries
        ]
        self._pending = []
        noted.sort(key=lambda entry: entry[0])
        with distributed.raise_on_all_ranks(), writing(self._path):
            if distributed.is_main_process():
                self._append(noted)
        self._bad.update(sample.epoch for _, sample in noted)
        allowed = math.floor(self._share * self._per_epoch)
        for epoch, bad in sorted(self._bad.items()):
            if bad > allowed:
                raise UserError(
                    f"epoch {epoch} has {bad} bad samples so far, more than data.max_bad "
                    f"({self._share:g}) of {self._per_epoch} allows ({allowed}); look into "
                    f"{self._path} (the last: {noted[-1][1]}), mend them, or raise data.max_bad"
                )

    def _append(self, noted: list[tuple[int, Skipped]]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            for step, sample in noted:
                line = {"step": step, **asdict(sample)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
