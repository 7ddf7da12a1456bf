"""Trackers that get a run's metrics besides metrics.jsonl and TensorBoard: W&B, MLflow.

To add one, write a function that starts it and name the function in `TRACKERS`. Those here come
with accelerate and work without a network: `WANDB_MODE=offline`, and MLflow writes into the run's
folder unless MLFLOW_TRACKING_URI says another place. A resumed run continues the tracker's run.
"""

import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.log import logger
from dist_vse.common.reading import BadFileError, read_json
from dist_vse.config.checks import one_of

IDS_NAME = "trackers.json"  # in the run's folder: the id that each tracker gave the run


class Tracker(Protocol):
    """What receives the metrics, on rank 0 alone."""

    name: str

    def log(self, values: dict[str, float], *, step: int) -> object: ...

    def finish(self) -> object: ...


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is started with; `run_id` is None at the first start of a run."""

    run_dir: Path
    project: str
    settings: dict[str, object]
    run_id: str | None


@dataclass(frozen=True)
class TrackerSpec:
    """A kind of tracker."""

    start: Callable[[TrackedRun], tuple[Tracker, str]]  # returns the tracker and the run's id
    package: str | None  # the package that it needs; an extra of the same name installs it


def check_tracker_names(names: Sequence[str]) -> None:
    """Raise UserError for a name that no tracker has."""
    for name in names:
        one_of("trackers", name, [*TRACKERS])


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is unknown or not installed."""
    check_tracker_names(names)
    for name in names:
        package = TRACKERS[name].package
        if package is not None and find_spec(package) is None:
            raise UserError(
                f"trackers={name}: the package {package} is not installed; "
                f"pip install 'dist_vse[{package}]', or leave it out"
            )


def start_trackers(
    names: Sequence[str], run_dir: Path, *, project: str, settings: dict[str, object]
) -> list[Tracker]:
    """Start them, on rank 0 alone. Raises UserError if one cannot start."""
    if not names:
        return []
    path = run_dir / IDS_NAME
    try:
        ids = {k: v for k, v in read_json(path).items() if isinstance(v, str)}
    except BadFileError:  # missing or damaged: they start again
        ids = {}
    started = []
    for name in names:
        run = TrackedRun(run_dir, project, settings, ids.get(name))
        try:
            tracker, ids[name] = TRACKERS[name].start(run)
        except Exception as error:  # each library has its own kinds
            raise UserError(f"trackers={name}: does not start ({first_line(error)})") from error
        started.append(tracker)
    path.write_text(json.dumps(ids) + "\n", encoding="utf-8")
    return started


def call_trackers(trackers: Sequence[Tracker], call: Callable[[Tracker], object]) -> list[Tracker]:
    """Call each tracker and return those that still work; one that fails is named and left out.

    Training and its own record go on without it.
    """
    working = []
    for tracker in trackers:
        try:
            call(tracker)
        except Exception as error:  # each library has its own kinds
            reason = first_line(error)
            logger.warning("tracker %s failed (%s): going on without it", tracker.name, reason)
        else:
            working.append(tracker)
    return working


def _start_wandb(run: TrackedRun) -> tuple[Tracker, str]:
    from accelerate import PartialState
    from accelerate.tracking import WandBTracker

    PartialState()  # accelerate's log needs it
    run_id = run.run_id or uuid.uuid4().hex[:8]
    name = run.run_dir.resolve().name
    tracker: Any = WandBTracker(
        run.project, name=name, dir=str(run.run_dir), id=run_id, resume="allow"
    )
    tracker.start()
    tracker.store_init_configuration(run.settings)
    return tracker, run_id


def _start_mlflow(run: TrackedRun) -> tuple[Tracker, str]:
    from accelerate import PartialState
    from accelerate.tracking import MLflowTracker

    PartialState()  # accelerate's log needs it
    if "MLFLOW_TRACKING_URI" not in os.environ:
        # MLflow 3 refuses plain files unless this is set.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ["MLFLOW_TRACKING_URI"] = (run.run_dir.resolve() / "mlruns").as_uri()
    name = run.run_dir.resolve().name
    tracker: Any = MLflowTracker(run.project, run_id=run.run_id, run_name=name, nested_run=False)
    tracker.main_process_only = False  # rank 0 alone calls it
    tracker.start()
    if run.run_id is None:  # MLflow lets nobody change a run's parameters
        tracker.store_init_configuration(run.settings)
    return tracker, tracker.active_run.info.run_id


TRACKERS = {
    "wandb": TrackerSpec(_start_wandb, "wandb"),
    "mlflow": TrackerSpec(_start_mlflow, "mlflow"),
}
