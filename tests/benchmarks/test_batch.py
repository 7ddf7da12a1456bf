"""The search of losses, batches and rates goes on beyond an edge, and its picture is whole."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.batch import read_cell, samples_to
from benchmarks.support.batch_picture import draw
from benchmarks.support.batch_runs import SAMPLES, Cell, best_rate, half_interval, next_rate


def _write(folder: Path, cell: Cell, rsum: list[float], *, split: str = "val") -> None:
    """Write the metrics of a run whose evaluations lie equally far apart."""
    run = folder / cell.name
    run.mkdir(parents=True)
    lines: list[dict[str, object]] = [
        {"kind": "eval", "split": split, "samples_seen": SAMPLES * i // (len(rsum) - 1), "rsum": r}
        for i, r in enumerate(rsum)
    ]
    lines.append({"kind": "train", "pairs_per_s": 1000.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_search_goes_on_beyond_the_edge_of_the_best_rate() -> None:
    assert next_rate({"1e-3": 1.0, "3e-3": 2.0, "1e-2": 1.5}) is None
    assert next_rate({"1e-3": 1.0, "3e-3": 2.0, "1e-2": 2.5}) == "3e-2"
    assert next_rate({"1e-3": 3.0, "3e-3": 2.0}) == "3e-4"
    assert best_rate({"1e-3": 1.0, "3e-3": -math.inf}) == "1e-3"
    assert half_interval([1.0]) is None and half_interval([1.0, 2.0, 3.0]) == pytest.approx(
        2.484, abs=1e-3
    )


def test_a_cell_holds_its_rates_its_seeds_and_its_curve(tmp_path: Path) -> None:
    for rate, end in (("1e-3", 40.0), ("3e-3", 80.0), ("1e-2", 60.0)):
        _write(tmp_path, Cell("convse", 64, rate), [0.0, end / 2, end])
    (tmp_path / Cell("convse", 64, "3e-2").name).mkdir()  # a run that failed
    for seed in (1, 2):
        _write(tmp_path, Cell("convse", 64, "3e-3", seed), [0.0, 70.0 + seed], split="test")
    cell = read_cell(tmp_path, "convse", 64)
    assert cell is not None and read_cell(tmp_path, "dcl", 64) is None
    assert cell["best"] == "3e-3" and not cell["at_edge"] and cell["failed_rates"] == ["3e-2"]
    assert cell["test"] == [71.0, 72.0] and cell["pairs_per_s"] == 1000.0
    assert samples_to(cell, 60.0) == SAMPLES * 0.75 and samples_to(cell, 81.0) is None
    picture = ElementTree.fromstring(draw([cell, cell | {"batch": 256, "test": [60.0]}]))
    assert "convse: 72 at 64, 60 at 256" in str(picture[0].text)
