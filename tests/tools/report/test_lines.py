"""The metrics of a very long run: means of its lines, in bounded memory, and the same chart."""

import json
import math
import re
import tracemalloc
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.tools.report import chart
from dist_vse.tools.report import lines as module
from dist_vse.tools.report.chart import Series
from dist_vse.tools.report.lines import Lines, extremes, points, read_metrics
from tests.support.reports import metrics_lines


def _line(step: int) -> dict[str, float]:
    return {"step": step, "samples_seen": 2 * step, "loss": math.sin(step) + 1 / step}


def _gather(steps: range) -> Lines:
    found = Lines()
    for step in steps:
        found.add(_line(step))
    return found


def test_few_lines_stay_as_they_are_and_the_later_of_a_step_counts() -> None:
    found = _gather(range(1, 9))
    again = {**_line(5), "loss": 7.0}
    found.add(again)
    assert found.by_step() == [again if s == 5 else _line(s) for s in range(1, 9)]
    assert extremes(found.by_step(), "loss") == []
    assert found.first == _line(1) and found.last == _line(8)


def test_many_lines_become_means_with_their_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINES", 10)
    found = _gather(range(1, 65))
    kept = found.by_step()
    assert len(kept) == 4  # of sixteen lines each
    assert found.first == _line(1) and found.last == _line(64)
    for number, (x, value) in enumerate(points(kept, "samples_seen", "loss")):
        own = [_line(16 * number + i) for i in range(1, 17)]
        losses = [line["loss"] for line in own]
        assert x == pytest.approx(sum(line["samples_seen"] for line in own) / 16)
        assert value == pytest.approx(sum(losses) / 16)
        assert extremes(kept, "loss")[number] == (min(losses), max(losses))


def test_a_value_that_is_not_finite_or_absent_spoils_no_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_LINES", 4)
    found = Lines()
    for step, loss in enumerate((1.0, math.nan, 3.0, 5.0, math.inf), 1):
        found.add({"step": step, "loss": loss} | ({"noise": 2.0} if step == 1 else {}))
    kept = found.by_step()
    assert [value for _, value in points(kept, "step", "loss")] == [1.0, 4.0, math.inf]
    assert extremes(kept, "loss") == [(1.0, 1.0), (3.0, 5.0), (math.inf, math.inf)]
    assert points(kept, "step", "noise") == [(1.5, 2.0)]


def test_the_curve_of_means_is_that_of_all_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(found: Lines) -> tuple[list[tuple[float, float]], ...]:
        kept = found.by_step()
        series = Series("loss", "s1", points(kept, "step", "loss"), extremes(kept, "loss"))
        line, low, high = chart._bins(series)
        return list(line), low, high

    exact = drawn(_gather(range(1, 6401)))
    monkeypatch.setattr(module, "MAX_LINES", 1000)
    means = drawn(_gather(range(1, 6401)))  # 800 means of eight lines; 200 bins of 32 lines
    for some, others in zip(means, exact, strict=True):
        assert [x for x, _ in some] == pytest.approx([x for x, _ in others])
        assert [y for _, y in some] == pytest.approx([y for _, y in others])


def test_the_axis_holds_the_band() -> None:
    series = Series("loss", "s1", [(0, 1.0), (1, 1.0)], [(-7.0, 5.0), (1.0, 1.0)])
    drawn = chart.line_chart("Loss", [series], from_zero=False, x_label="steps")
    band = drawn[drawn.index('class="band') :].split("/>")[0]
    heights = [float(y) for y in re.findall(r"[ML]\S+ (\S+?)(?=[LZ])", band)]
    assert len(heights) == 4 and chart.TOP <= min(heights) < max(heights) <= chart.HEIGHT


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LINES", 500)
    first, *steps, last = (json.loads(line) for line in metrics_lines())

    def peak(count: int) -> int:
        path = tmp_path / str(count)
        with path.open("w") as file:
            for step in range(1, count + 1):
                file.write(json.dumps({**steps[0], "step": step}) + "\n")
            file.write(json.dumps(first) + "\n" + json.dumps(last) + "\n")
        tracemalloc.start()
        try:
            metrics = read_metrics(path, "val")
            assert metrics.train.last["step"] == count and len(metrics.train.by_step()) <= 500
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(16_000) < 1.2 * peak(2_000)


def test_a_file_without_a_line_is_one_line(tmp_path: Path) -> None:
    for content in (b"", b"\xff\n5\n"):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="has no train line yet"):
            read_metrics(tmp_path / "metrics.jsonl", "val")
