"""The log of samples that a run skipped: which, why, and how many are allowed."""

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from dist_vse import distributed
from dist_vse.common.errors import UserError, writing
from dist_vse.common.reading import is_count, json_lines
from dist_vse.data.samples import Skipped
from dist_vse.runs.files import drop_lines_after


class SkippedLog:
    """Collects every rank's bad samples in one file, and stops the run if there are too many."""

    def __init__(self, path: Path, start_step: int, *, share: float, per_epoch: int) -> None:
        """Continue after `start_step`; a `share` of an epoch's `per_epoch` samples may be bad."""
        self._path, self._share, self._per_epoch = path, share, per_epoch
        self._pending: list[tuple[int, Skipped]] = []
        epochs: list[int] = []
        with distributed.raise_on_all_ranks(), writing(path):
            if distributed.is_main_process():
                drop_lines_after(path, start_step)
                epochs = [
                    line["epoch"] for _, line in json_lines(path) if is_count(line.get("epoch"))
                ]
        self._bad: Counter[int] = Counter(distributed.broadcast_object(epochs))  # by epoch

    def add(self, step: int, skipped: tuple[Skipped, ...]) -> None:
        """Record what this rank skipped before a step's batch was full."""
        self._pending += [(step, sample) for sample in skipped]

    def flush(self) -> None:
        """Write what all ranks recorded since the last call; every rank calls this.

        Raises UserError, alike on every rank, if an epoch has too many bad samples, or if the file
        can't be written.
        """
        if not distributed.any_rank(bool(self._pending)):
            return
        records = [
            entry for entries in distributed.all_gather_object(self._pending) for entry in entries
        ]
        self._pending = []
        records.sort(key=lambda entry: entry[0])
        with distributed.raise_on_all_ranks(), writing(self._path):
            if distributed.is_main_process():
                self._append(records)
        self._bad.update(sample.epoch for _, sample in records)
        allowed = math.floor(self._share * self._per_epoch)
        for epoch, bad in sorted(self._bad.items()):
            if bad > allowed:
                raise UserError(
                    f"epoch {epoch} has {bad} bad samples so far, more than data.max_bad "
                    f"({self._share:g}) of {self._per_epoch} allows ({allowed}); see "
                    f"{self._path} (the last: {records[-1][1]}), fix them, or raise data.max_bad"
                )

    def _append(self, records: list[tuple[int, Skipped]]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            for step, sample in records:
                line = {"step": step, **asdict(sample)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
