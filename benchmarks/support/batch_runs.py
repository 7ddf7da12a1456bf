"""The runs of the search of losses, batches and rates: which there are, and how they ended."""

import math
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT
from dist_vse.common.errors import UserError
from dist_vse.common.reading import json_lines, read_json
from dist_vse.runs.files import METRICS_NAME, RESULT_NAME
from dist_vse.tools.report.batch import MIN_LINES, gain

CONFIG = ROOT / "configs" / "sweep_batch.yaml"
CLUSTER = ROOT / "configs" / "clusters" / "one_process.yaml"
RATES = ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1")
HARDEST = ("convse++", "vse++")
WARMUP = "loss.warmup_samples=21845"  # a third of the run, from the mean of violations to hardest
SAMPLES = 65_536  # pairs of every run, as the config says
EVALUATIONS = 8  # of a run
GUESS = {64: 5, 256: 6, 512: 6, 1024: 6, 2048: 6, 4096: 5}  # rate at the middle of the first three
REPORT, REPORT_LINES, REPORT_CHUNKS = "report", 32, 8  # runs with the batch report
T_95 = {2: 12.706, 3: 4.303}  # Student's t, two-sided, by the number of seeds
SEEDS = (1, 2)  # of the best rate, beside the seed 0 of the search


@dataclass(frozen=True, order=True)
class Cell:
    """A run: a loss at a batch with a rate and a seed."""

    loss: str
    batch: int
    rate: str
    seed: int = 0

    @property
    def name(self) -> str:
        """The run's folder, as a sweep of these four settings names it."""
        return (
            f"loss.name={self.loss},global_batch_size={self.batch},optim.lr={self.rate},"
            f"seed={self.seed}"
        )


class NoiseScale(NamedTuple):
    """The gradient's noise scale in pairs, and its bounds by two standard errors."""

    pairs: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """The evaluations of a run."""

    samples: list[int]
    rsum: list[float]
    seconds: float  # of training, from the pairs a second at the log steps

    @property
    def end(self) -> float:
        """The last one."""
        return self.rsum[-1]


def read_curve(folder: Path, cell: Cell, split: str = "val") -> Curve | None:
    """Return a run's evaluations on a split; None unless it came to its end."""
    path = folder / cell.name / METRICS_NAME
    if not path.is_file():
        return None
    lines = [line for _, line in json_lines(path)]
    evals = [line for line in lines if line["kind"] == "eval" and line["split"] == split]
    if not evals or evals[-1]["samples_seen"] < SAMPLES:
        return None
    speeds = [line["pairs_per_s"] for line in lines if "pairs_per_s" in line]
    seconds = SAMPLES / speeds[-1] if speeds else float("nan")
    return Curve(
        [line["samples_seen"] for line in evals], [line["rsum"] for line in evals], seconds
    )


def run_missing(
    folder: Path, cells: Iterable[Cell], settings: Sequence[str], parallel: int
) -> None:
    """Train what has not been trained, with `dist-vse submit --sweep`.

    A run that fails, such as one that diverges, is left behind.
    """
    wanted: dict[tuple[str, int, bool], set[tuple[str, int]]] = defaultdict(set)
    for cell in cells:
        if not (folder / cell.name / METRICS_NAME).is_file():
            wanted[cell.loss, cell.batch, cell.loss in HARDEST].add((cell.rate, cell.seed))
    together: dict[tuple[int, bool, frozenset[tuple[str, int]]], list[str]] = defaultdict(list)
    for (loss, batch, hardest), of_loss in wanted.items():
        together[batch, hardest, frozenset(of_loss)].append(loss)
    for (batch, hardest, points), losses in together.items():
        rates, seeds = {rate for rate, _ in points}, {seed for _, seed in points}
        assert len(rates) * len(seeds) == len(points), "a grid"
        axes = (
            f"loss.name={','.join(losses)}",
            f"global_batch_size={batch}",
            f"optim.lr={','.join(sorted(rates, key=float))}",
            f"seed={','.join(map(str, sorted(seeds)))}",
        )
        every = f"eval_every={max(1, SAMPLES // batch // EVALUATIONS)}"
        warmup = [WARMUP] if hardest else []
        split = [] if seeds == {0} else ["data.eval_split=test"]
        print(f"batch {batch}: {axes[0]} {axes[2]} {axes[3]}", flush=True)
        _dist_vse(
            *("submit", str(CONFIG), *settings, f"output_dir={folder}", every, *warmup, *split),
            *("--cluster", str(CLUSTER), "--parallel", str(parallel), "--sweep", *axes),
        )


def read_test(folder: Path, cell: Cell) -> float | None:
    """Return what `dist-vse eval --split test` measured of a run; None if it was not asked."""
    path = folder / cell.name / RESULT_NAME.format(split="test")
    return float(read_json(path)["trained"]["rsum"]) if path.is_file() else None


def tried(folder: Path, loss: str, batch: int) -> dict[str, float]:
    """Return the final rsum on val by rate, -inf where a run did not come to its end."""
    found = {}
    for rate in RATES:
        cell = Cell(loss, batch, rate)
        if (folder / cell.name).is_dir():
            curve = read_curve(folder, cell)
            found[rate] = curve.end if curve else float("-inf")
    return found


def best_rate(found: dict[str, float]) -> str:
    """Return the rate of the highest rsum."""
    return max(found, key=lambda rate: found[rate])


def next_rate(found: dict[str, float]) -> str | None:
    """Return the rate beyond the best one if that lies at an edge of those tried; else None."""
    order = sorted(found, key=float)
    at = RATES.index(best_rate(found))
    if RATES[at] == order[0] and at > 0:
        return RATES[at - 1]
    if RATES[at] == order[-1] and at + 1 < len(RATES):
        return RATES[at + 1]
    return None


def search(
    folder: Path,
    losses: Sequence[str],
    batches: Sequence[int],
    settings: Sequence[str],
    *,
    parallel: int,
) -> None:
    """Find the best rate of each loss and batch: three at first, then on beyond the edges."""
    for batch in batches:
        first = RATES[GUESS[batch] - 1 : GUESS[batch] + 2]
        cells = [Cell(loss, batch, rate) for loss in losses for rate in first]
        run_missing(folder, cells, settings, parallel)
    while True:
        beyond = [
            Cell(loss, batch, rate)
            for batch in batches
            for loss in losses
            for rate in [next_rate(tried(folder, loss, batch))]
            if rate is not None
        ]
        if not beyond:
            return
        run_missing(folder, beyond, settings, parallel)


def repeat_best(
    folder: Path,
    losses: Sequence[str],
    batches: Sequence[int],
    settings: Sequence[str],
    *,
    parallel: int,
) -> None:
    """Train the best rate with further seeds, evaluated on test."""
    cells = [
        replace(Cell(loss, batch, best_rate(tried(folder, loss, batch))), seed=seed)
        for batch in batches
        for loss in losses
        for seed in SEEDS
    ]
    run_missing(folder, cells, settings, parallel)
    for cell in {replace(cell, seed=0) for cell in cells}:
        if read_test(folder, cell) is None:
            _dist_vse("eval", str(folder / cell.name), "--split", "test")


def half_interval(values: list[float]) -> float | None:
    """Return half of the 95 % interval of a mean; None of one value."""
    if len(values) < 2:
        return None
    return T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def report_best(
    folder: Path,
    losses: Sequence[str],
    batches: Sequence[int],
    settings: Sequence[str],
    *,
    parallel: int,
) -> None:
    """Train the best rate once more with `batch_report`, into `folder`/report."""
    for batch in batches:
        cells = [Cell(loss, batch, best_rate(tried(folder, loss, batch))) for loss in losses]
        every = f"log_every={max(1, SAMPLES // batch // REPORT_LINES)}"
        report = [*settings, "batch_report=true", f"chunk_size={batch // REPORT_CHUNKS}", every]
        run_missing(folder / REPORT, cells, report, parallel)


def has_report(folder: Path, loss: str, batch: int, rate: str) -> bool:
    """Return whether a run with the batch report came to its end."""
    return read_curve(folder / REPORT, Cell(loss, batch, rate)) is not None


def read_noise_scale(
    folder: Path, loss: str, batch: int, rate: str, until: float
) -> NoiseScale | None:
    """Return what the batch report of a run says of its first `until` pairs.

    None where the report can't distinguish the gradient from zero.
    """
    path = folder / REPORT / Cell(loss, batch, rate).name / METRICS_NAME
    lines = [line for _, line in json_lines(path) if "noise" in line]
    lines = [line for line in lines if line["samples_seen"] <= until]
    found = gain(lines, batch) if len(lines) >= MIN_LINES else None
    if found is None:
        return None
    share, error = found
    low, high = (min(1.0, max(1e-9, share + sign * 2 * error)) for sign in (1, -1))
    return NoiseScale(*(batch * (1 / x - 1) for x in (share, low, high)))


def _dist_vse(*arguments: str) -> None:
    """Run a command of dist-vse. Raises UserError for what it refuses."""
    command = [str(Path(sys.executable).with_name("dist-vse")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise UserError(f"dist-vse {arguments[0]}: {done.stderr.strip()}")
