"""What a run's folder holds: its config, its metrics, its results and its examples."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.reading import BadFileError, read_json
from dist_vse.config import TrainConfig, dump_config, load_config
from dist_vse.runs.environment import read_environment, trained_on
from dist_vse.runs.files import CONFIG_NAME, EXAMPLES_NAME, METRICS_NAME
from dist_vse.tools.report.lines import Lines, Metrics, is_figure, read_metrics

_EXAMPLES = ("split", "chance", "text_to_image", "image_to_text")


@dataclass(frozen=True)
class Result:
    """Retrieval on one split: metrics under `trained`, and `untrained` and `chance` if known."""

    split: str
    protocol: str
    data: str  # fingerprint of the data set; empty where it was not noted
    checkpoint: str  # such as step-000400, or "step 400" where training measured it
    columns: dict[str, dict[str, float]]
    intervals: dict[str, list[float]]  # [low, high] of trained metrics, where they were drawn

    @property
    def step(self) -> int:
        """The checkpoint's step, -1 for one of another name."""
        digits = re.fullmatch(r"step[- ](\d+)", self.checkpoint)
        return int(digits[1]) if digits else -1


@dataclass(frozen=True)
class Record:
    """All that the report shows of a run, but the images."""

    name: str
    config: TrainConfig
    metrics: Metrics
    results: list[Result]  # at least one; first the plain one of the newest weights
    examples: dict[str, Any] | None
    environment: dict[str, Any] | None  # of the run's last start

    @property
    def data(self) -> str:
        """Fingerprint that the run's own data set had in training; empty where none was noted."""
        return trained_on(self.environment, self.config.data.index)

    def on_other_data(self, result: Result) -> bool:
        """Return whether the result is known to be on another data set than the run's own."""
        return "" not in (self.data, result.data) and result.data != self.data

    def column_name(self, column: str) -> str:
        """Return what to call a result's column: `untrained` may be a checkpoint's start."""
        return self.config.before_name if column == "untrained" else column

    @property
    def config_text(self) -> str:
        """The whole config as YAML."""
        return dump_config(self.config)


def read_record(run_dir: Path) -> Record:
    """Read a run's folder.

    Raises UserError if it is no run, has no metrics yet, or holds a file that cannot be read.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run; give the output_dir of a training")
    config = load_config(run_dir / CONFIG_NAME)
    metrics = read_metrics(run_dir / METRICS_NAME, config.data.eval_split)
    path = run_dir / EXAMPLES_NAME
    examples = _read_json(path, *_EXAMPLES) if path.is_file() else None
    made = read_environment(run_dir)
    files = sorted(run_dir.glob("eval-*.json"), key=lambda file: (len(file.name), file.name))
    found = [_tested(_read_json(file, "split", "checkpoint", "trained")) for file in files]
    found.append(_watched(metrics.evals, examples, trained_on(made, config.data.index)))
    name = run_dir.resolve().name
    record = Record(name, config, metrics, [], examples, made)
    return replace(record, results=_in_order(found, record))


def _in_order(results: list[Result], record: Record) -> list[Result]:
    """Put the plain result of the newest weights on the run's own data first, then the others.

    Of equally new ones, a split that training did not watch comes first. What training measured
    itself (the last of `results`) is left out where `dist-vse eval` did so again, as late.
    """

    def key(result: Result) -> tuple[bool, bool, int, bool]:
        watched = result.split == record.config.data.eval_split
        return record.on_other_data(result), result.protocol != "plain", -result.step, watched

    *tested, last = results
    again = any(r.split == last.split and key(r) <= key(last) for r in tested)
    return sorted(tested if again else results, key=key)


def _tested(content: dict[str, Any]) -> Result:
    """Return what `dist-vse eval` measured."""
    return Result(
        content["split"],
        content.get("protocol", "plain"),
        content.get("data", ""),
        content["checkpoint"],
        {name: content[name] for name in ("untrained", "trained", "chance") if name in content},
        content.get("intervals", {}),
    )


def _watched(evals: Lines, examples: dict[str, Any] | None, data: str) -> Result:
    """Return the result that training itself measured, from the first to the last evaluation."""
    last, columns = evals.last, watched_columns(evals)
    if examples is not None and examples["split"] == last["split"]:
        columns["chance"] = examples["chance"]
    return Result(last["split"], "plain", data, f"step {last['step']}", columns, {})


def watched_columns(evals: Lines, prefix: str = "") -> dict[str, dict[str, float]]:
    """Return what begins with the prefix, without it, before training and at the end."""
    columns = {"untrained": evals.first} if evals.first["step"] == 0 else {}
    if evals.last["step"] > 0:
        columns["trained"] = evals.last
    found = {
        name: {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        for name, line in columns.items()
    }
    return {name: values for name, values in found.items() if values}


def _read_json(path: Path, *needed: str) -> dict[str, Any]:
    try:
        content = read_json(path)
        missing = [name for name in needed if name not in content]
        if not missing:
            _check_types(content)
    except BadFileError as error:
        raise UserError(f"{path}: {error}; run `dist-vse eval` again") from error
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; run `dist-vse eval` again")
    return content


def _check_types(content: dict[str, Any]) -> None:
    """Raise BadFileError unless results and examples hold what the page computes with."""
    for name, value in content.items():
        if name in ("trained", "untrained", "chance", "metrics"):
            if not isinstance(value, dict) or not all(map(is_figure, value.values())):
                raise BadFileError(f"{name} must hold numbers")
        elif name.startswith(("text_to_image", "image_to_text")):
            fields = ("caption", "key") if name.startswith("text") else ("key", "caption")
            if not isinstance(value, list) or not all(_is_query(q, *fields) for q in value):
                raise BadFileError(f"{name} must hold queries with their answers")
        elif name == "neighbours":
            if not isinstance(value, dict) or not all(map(_are_neighbours, value.values())):
                raise BadFileError(f"{name} must hold keys and scores")
        elif name in ("split", "checkpoint", "protocol", "data") and not isinstance(value, str):
            raise BadFileError(f"{name} must be a text")


def _is_query(query: object, asked: str, found: str) -> bool:
    """Return whether an example has what is drawn: texts `asked` and `found`, ranks, scores."""
    if not isinstance(query, dict) or not isinstance(query.get("answers"), list):
        return False
    answers = all(
        isinstance(answer, dict)
        and isinstance(answer.get(found), str)
        and isinstance(answer.get("right"), bool)
        and is_figure(answer.get("score"))
        for answer in query["answers"]
    )
    texts = all(isinstance(query.get(name), str) for name in ("key", asked))
    return answers and texts and is_figure(query.get("rank"))


def _are_neighbours(near: object) -> bool:
    """Return whether an image's nearest others have keys and scores."""
    return isinstance(near, list) and all(
        isinstance(other, dict)
        and isinstance(other.get("key"), str)
        and is_figure(other.get("score"))
        for other in near
    )
