"""What a run's folder tells: its config, its metrics, its results and its examples."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vse.config import TrainConfig, dump_config, load_config
from dist_vse.environment import read_environment
from dist_vse.errors import UserError
from dist_vse.run_files import CONFIG_NAME, EXAMPLES_NAME, METRICS_NAME

Line = dict[str, Any]  # of metrics.jsonl
RETRIEVAL = tuple(f"{way}_{name}" for way in ("i2t", "t2i") for name in ("r1", "r5", "r10", "medr"))
_EXAMPLES = ("split", "chance", "text_to_image", "image_to_text")
_FIELDS = {
    "train": ("samples_seen", "loss", "lr", "pairs_per_s", "memory_gib"),
    "eval": ("samples_seen", "split", "num_images", "num_texts", "rsum", *RETRIEVAL),
}


@dataclass(frozen=True)
class Result:
    """Retrieval on one split: metrics under `trained`, and `untrained` and `chance` if known."""

    split: str
    model: str  # which weights, such as "step 400"
    columns: dict[str, dict[str, float]]
    intervals: dict[str, list[float]]  # [low, high] of trained metrics, where they were drawn


@dataclass(frozen=True)
class Record:
    """All that the report shows of a run, but the images."""

    name: str
    config: TrainConfig
    train: list[Line]  # by step
    evals: list[Line]  # by step, of the run's own split
    results: list[Result]  # at least one; the most telling first
    examples: dict[str, Any] | None
    environment: dict[str, Any] | None  # of the run's last start

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
    lines = _read_metrics(run_dir / METRICS_NAME)
    train = _by_step(lines, "train", run_dir)
    split = config.data.eval_split
    evals = [line for line in _by_step(lines, "eval", run_dir) if line["split"] == split]
    if not evals:
        raise UserError(f"{run_dir / METRICS_NAME}: has no evaluation on split {split!r}")
    path = run_dir / EXAMPLES_NAME
    examples = _read_json(path, *_EXAMPLES) if path.is_file() else None
    tested = [
        Result(
            content["split"],
            _model_name(content),
            _columns(content),
            content.get("intervals", {}),
        )
        for file in sorted(run_dir.glob("eval-*.json"))
        for content in [_read_json(file, "split", "checkpoint", "trained")]
    ]
    watched = [] if split in {r.split for r in tested} else [_watched(evals, examples)]
    name = run_dir.resolve().name
    return Record(name, config, train, evals, tested + watched, examples, read_environment(run_dir))


def _watched(evals: list[Line], examples: dict[str, Any] | None) -> Result:
    """Return the result that training itself measured, from the first to the last evaluation."""
    first, last = evals[0], evals[-1]
    columns = {"untrained": first} if first["step"] == 0 else {}
    if last["step"] > 0:
        columns["trained"] = last
    if examples is not None and examples["split"] == last["split"]:
        columns["chance"] = examples["chance"]
    return Result(last["split"], f"step {last['step']:,}", columns, {})


def _model_name(content: dict[str, Any]) -> str:
    protocol = content.get("protocol", "plain")
    return str(content["checkpoint"]) + (f", {protocol}" if protocol != "plain" else "")


def _columns(content: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: content[name] for name in ("untrained", "trained", "chance") if name in content}


def _read_metrics(path: Path) -> list[tuple[int, Line]]:
    """Return (line number, content); the last line of a killed run may be cut and is left out."""
    if not path.is_file():
        raise UserError(f"{path}: no metrics; has the run started?")
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                break
            raise UserError(f"{path}: line {number} is no JSON ({error}); remove it") from error
        if not isinstance(line, dict):
            raise UserError(f"{path}: line {number} is no JSON object; remove it")
        lines.append((number, line))
    return lines


def _by_step(lines: list[tuple[int, Line]], kind: str, run_dir: Path) -> list[Line]:
    """Return the lines of a kind by step; of a step that was run twice, the later one."""
    path = run_dir / METRICS_NAME
    found: dict[int, Line] = {}
    for number, line in lines:
        if line.get("kind") != kind:
            continue
        missing = [name for name in ("step", *_FIELDS[kind]) if name not in line]
        if missing:
            raise UserError(f"{path}: line {number} ({kind}) lacks {', '.join(missing)}; remove it")
        found[line["step"]] = line
    if not found:
        raise UserError(f"{path}: has no {kind} line yet; wait for the run's next one")
    return [found[step] for step in sorted(found)]


def _read_json(path: Path, *needed: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in needed if name not in content]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path}: no JSON ({error}); run `dist-vse eval` again") from error
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; run `dist-vse eval` again")
    return content
