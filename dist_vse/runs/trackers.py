"""Weights & Biases and MLflow, through accelerate's trackers; TensorBoard is always there.

Both work without a network: `WANDB_MODE=offline`, and MLflow writes into the run's folder unless
MLFLOW_TRACKING_URI says another place. A resumed run goes on in the same one of the tracker's
runs.
"""

import json
import os
import uuid
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.log import logger

IDS_NAME = "trackers.json"  # in the run's folder: the trackers' own names of the run


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"trackers={name}: the package {name} is not installed; "
                f"pip install 'dist_vse[{name}]', or leave it out"
            )


def start_trackers(
    names: Sequence[str], run_dir: Path, *, project: str, settings: dict[str, object]
) -> list[Any]:
    """Start them on rank 0; each has `log(values, step=...)` and `finish()`.

    Raises UserError if one cannot start.
    """
    if not names:
        return []
    from accelerate import PartialState

    PartialState()  # accelerate's log insists on it
    path = run_dir / IDS_NAME
    ids: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    started = []
    for name in names:
        try:
            tracker = {"wandb": _wandb, "mlflow": _mlflow}[name](run_dir, project, ids)
            if name not in ids or name == "wandb":
                tracker.store_init_configuration(settings)
        except Exception as error:  # each library has its own kinds
            raise UserError(f"trackers={name}: does not start ({first_line(error)})") from error
        ids[name] = tracker.run.id if name == "wandb" else tracker.active_run.info.run_id
        started.append(tracker)
    path.write_text(json.dumps(ids) + "\n", encoding="utf-8")
    return started


def tell(trackers: Sequence[Any], call: Callable[[Any], object]) -> list[Any]:
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


def _wandb(run_dir: Path, project: str, ids: dict[str, str]) -> Any:
    from accelerate.tracking import WandBTracker

    name = ids.get("wandb") or uuid.uuid4().hex[:8]
    tracker = WandBTracker(
        project, name=run_dir.resolve().name, dir=str(run_dir), id=name, resume="allow"
    )
    tracker.start()
    return tracker


def _mlflow(run_dir: Path, project: str, ids: dict[str, str]) -> Any:
    from accelerate.tracking import MLflowTracker

    if "MLFLOW_TRACKING_URI" not in os.environ:
        # MLflow 3 wants to be told that plain files are meant.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ["MLFLOW_TRACKING_URI"] = (run_dir.resolve() / "mlruns").as_uri()
    tracker = MLflowTracker(
        project, run_id=ids.get("mlflow"), run_name=run_dir.resolve().name, nested_run=False
    )
    tracker.main_process_only = False  # rank 0 alone calls it
    tracker.start()
    return tracker
