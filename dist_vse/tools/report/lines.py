"""The lines of a run's metrics, in bounded memory: those of a very long run become means."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.reading import BadFileError, is_number, json_lines

Line = dict[str, Any]
MAX_LINES = 20_000
"""Of one kind; a chart draws 200 points."""
NEWEST = 20
"""Lines whose noise the section on the batch reads: the noise grows along a run."""
RETRIEVAL = tuple(f"{way}_{name}" for way in ("i2t", "t2i") for name in ("r1", "r5", "r10", "medr"))
_FIELDS = {
    "train": ("samples_seen", "loss", "lr", "pairs_per_s", "memory_gib"),
    "eval": ("samples_seen", "split", "num_images", "num_texts", "rsum", *RETRIEVAL),
}
_FIGURES = (float, int)  # what JSON's numbers become; a bool is none
_LOW, _HIGH, _COUNT = " low", " high", " count"  # of a mean: extremes by field, number of lines


@dataclass
class Lines:
    """Lines of one kind by step; of a step that was run twice, the later one."""

    _found: dict[int, Line] = field(default_factory=dict)
    _ends: list[Line] = field(default_factory=list)  # the first and the last one
    _width: int = 1  # lines that one of `_found` is the mean of

    def add(self, line: Line) -> None:
        """Take a line; once there are too many, neighbours are merged."""
        step = line["step"]
        self._found[step] = line
        if not self._ends:
            self._ends = [line, line]
        if step <= self._ends[0]["step"]:
            self._ends[0] = line
        if step >= self._ends[1]["step"]:
            self._ends[1] = line
        if len(self._found) > MAX_LINES:
            self._merge()
            if len(self._found) > MAX_LINES // 2:
                self._width *= 2
                self._merge()

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def first(self) -> Line:
        """The line of the lowest step, as it was written."""
        return self._ends[0]

    @property
    def last(self) -> Line:
        """The line of the highest step, as it was written."""
        return self._ends[1]

    def by_step(self) -> list[Line]:
        """Return all lines, or means of equally many neighbours."""
        if self._width > 1:
            self._merge()
        return [self._found[step] for step in sorted(self._found)]

    def _merge(self) -> None:
        merged: dict[int, Line] = {}
        part: list[Line] = []
        count = 0
        for step in sorted(self._found):
            line = self._found[step]
            part.append(line)
            count += line.get(_COUNT, 1)
            if count >= self._width:
                merged[step] = _mean(part)
                part, count = [], 0
        if part:
            merged[step] = _mean(part)
        self._found = merged


@dataclass(frozen=True)
class Metrics:
    """What a run's metrics hold."""

    train: Lines
    evals: Lines  # of the run's own split
    newest: list[Line]  # the last lines of training that have a `noise`
    left_out: str  # what of the file can't be read; empty where all can


def read_metrics(path: Path, split: str) -> Metrics:
    """Read a run's metrics as a stream.

    A damaged line is left out, and so is the last line of a killed run, which may be cut. Raises
    UserError if nothing is left to show.
    """
    if not path.is_file():
        raise UserError(f"{path}: no metrics; has the run started?")
    kinds = {"train": Lines(), "eval": Lines()}
    noisy: deque[Line] = deque(maxlen=NEWEST)
    other_splits, expected, num_bad, first_bad = False, 1, 0, ""
    try:
        for number, line in json_lines(path):
            if number > expected:
                num_bad += number - expected
                first_bad = first_bad or f"line {expected} is no JSON object"
            expected = number + 1
            kind = str(line.get("kind"))
            if kind not in kinds:
                continue
            if wrong := _what_is_wrong(line, kind):
                num_bad += 1
                first_bad = first_bad or f"line {number} ({kind}) {wrong}"
            elif kind == "eval" and line["split"] != split:
                other_splits = True
            else:
                kinds[kind].add(_numbers(line))
                noisy.extend([line] if "noise" in line else [])
    except BadFileError as error:
        raise UserError(f"{path}: can't be read ({error})") from error
    said = f"{first_bad}, and {num_bad - 1:,} more" if num_bad > 1 else first_bad
    for kind, lines in kinds.items():
        if not lines and kind == "eval" and other_splits:
            raise UserError(f"{path}: has no evaluation on split {split!r}")
        if not lines:
            why = f" ({said})" if said else ""
            raise UserError(f"{path}: has no {kind} line yet{why}; wait for the run's next one")
    return Metrics(kinds["train"], kinds["eval"], list(noisy), said)


def points(lines: Sequence[Line], x: str, name: str) -> list[tuple[float, float]]:
    """Return (x, value) of the lines that have the value."""
    return [(line[x], line[name]) for line in lines if name in line]


def extremes(lines: Iterable[Line], name: str) -> list[tuple[float, float]]:
    """Return (least, largest) for each of `points`; nothing where no line is a mean."""
    found = [
        (line[_LOW][name], line[_HIGH][name]) if _COUNT in line else (line[name], line[name])
        for line in lines
        if name in line
    ]
    return found if any(low != high for low, high in found) else []


def _what_is_wrong(line: Line, kind: str) -> str:
    """Return what a line lacks, or what of it is no number; a run that diverged has NaN."""
    missing = [name for name in ("step", *_FIELDS[kind]) if name not in line]
    if missing:
        return f"lacks {', '.join(missing)}"
    wrong = [name for name in _FIELDS[kind] if name != "split" and not is_figure(line[name])]
    if not is_number(line["step"], least=0):
        wrong = ["step", *wrong]
    return f"has no number in {wrong[0]}" if wrong else ""


def is_figure(value: object) -> bool:
    """Return whether a value from JSON is a number; a run that diverged has NaN."""
    return type(value) in _FIGURES


def _numbers(line: Line) -> Line:
    """Return the numbers of a line, and its split: no line of a long file holds more."""
    return {name: v for name, v in line.items() if type(v) in _FIGURES or name == "split"}


def _mean(lines: Sequence[Line]) -> Line:
    """Return the mean of each value of some lines, with its extremes and their number."""
    if len(lines) == 1:
        return lines[0]
    names = list(lines[0])
    if _COUNT not in lines[0] and all(list(line) == names for line in lines):
        return _mean_of_equals(names, lines)
    merged: Line = {_COUNT: sum(line.get(_COUNT, 1) for line in lines), _LOW: {}, _HIGH: {}}
    for name in {name: None for line in lines for name in line}:
        having = [line for line in lines if name in line and is_figure(line[name])]
        having = [line for line in having if math.isfinite(line[name])] or having
        if name in (_LOW, _HIGH, _COUNT) or not having:
            continue
        weights = [line.get(_COUNT, 1) for line in having]
        total = sum(line[name] * w for line, w in zip(having, weights, strict=True))
        merged[name] = total / sum(weights)
        merged[_LOW][name] = min(line.get(_LOW, line)[name] for line in having)
        merged[_HIGH][name] = max(line.get(_HIGH, line)[name] for line in having)
    return merged


def _mean_of_equals(names: Sequence[str], lines: Sequence[Line]) -> Line:
    """Do as `_mean` for lines of the same values, none a mean: nearly all are merged here."""
    merged: Line = {_COUNT: len(lines), _LOW: {}, _HIGH: {}}
    for name, values in zip(
        names, zip(*(line.values() for line in lines), strict=True), strict=True
    ):
        if name == "split":
            continue
        total = sum(values)
        if not math.isfinite(total):
            values = tuple(filter(math.isfinite, values)) or values
            total = sum(values)
        merged[name] = total / len(values)
        merged[_LOW][name], merged[_HIGH][name] = min(values), max(values)
    return merged
