"""Ending a run whose evaluations no longer become better."""

from collections.abc import Sequence
from pathlib import Path

from dist_vse import distributed
from dist_vse.common.reading import json_lines
from dist_vse.config.evaluation import score_of
from dist_vse.runs.files import METRICS_NAME


class EarlyStop:
    """Counts evaluations without a better score; a run that goes on counts on."""

    def __init__(self, patience: int, scores: Sequence[float] = ()) -> None:
        """Take the scores of the run so far; a patience of 0 never ends it."""
        self._patience, self._scores = patience, list(scores)

    def add(self, score: float) -> None:
        """Take the score of an evaluation; higher is better."""
        self._scores.append(score)

    @property
    def ends(self) -> bool:
        """Whether none of the last evaluations was better than the best before them."""
        before, last = self._scores[: -self._patience], self._scores[-self._patience :]
        return self._patience > 0 and len(before) > 0 and max(last) <= max(before)


def read_early_stop(run_dir: Path, metric: str, patience: int) -> EarlyStop:
    """Return the count of a run's folder; every rank calls this, and rank 0 reads it."""
    scores: list[float] = []
    with distributed.raise_on_all_ranks():
        if distributed.is_main_process() and (run_dir / METRICS_NAME).is_file():
            lines = (line for _, line in json_lines(run_dir / METRICS_NAME))
            found = [score_of(metric, line) for line in lines if line.get("kind") == "eval"]
            scores = [score for score in found if score is not None]
    return EarlyStop(patience, distributed.broadcast_object(scores))
