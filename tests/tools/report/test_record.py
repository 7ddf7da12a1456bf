"""What a report reads of a run: metrics and examples, begun, cut, damaged or not there."""

import json
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.tools.report import write_report
from tests.support.reports import metrics_lines, report, write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_a_run_that_has_just_begun(run_dir: Path) -> None:
    (run_dir / "examples.json").unlink()
    (run_dir / "metrics.jsonl").write_text("\n".join(metrics_lines()[:2]) + "\n")
    page = report(run_dir)
    assert "untrained" in page.text
    assert page.classes("trained") == page.classes("thumb") == 0


def test_a_last_line_cut_by_a_kill_is_left_out(run_dir: Path) -> None:
    whole = report(run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ste')
    assert report(run_dir).text == whole.text


def test_a_step_that_ran_twice_counts_once(run_dir: Path) -> None:
    lines = metrics_lines()
    again = json.dumps(json.loads(lines[1]) | {"pairs_per_s": 9e9})
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines[:2], again, lines[-1]]))
    page = report(run_dir)
    assert "9,000,000,000 pairs/s" in page.text  # the median of the later line alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "has no train line yet"),
        (lambda lines: lines[1:3], "has no eval line yet"),
        (lambda lines: lines[:1], "has no train line yet"),
        (
            lambda lines: [lines[0], '{"kind": "train", "step": 50}'],
            r"has no train line yet \(line 2 \(train\) lacks samples",
        ),
        (
            lambda lines: [line.replace('"val"', '"dev"') for line in lines],
            "has no evaluation on split 'val'",
        ),
    ],
)
def test_metrics_that_cannot_be_read(run_dir: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    (run_dir / "metrics.jsonl").write_text("\n".join(change(metrics_lines())))
    with pytest.raises(UserError, match=rf"metrics\.jsonl: {message}"):
        write_report(run_dir, None, run_dir / "report.html")
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{oops", "line 4 is no JSON object."),
        ("7\n{}x", "line 4 is no JSON object, and 1 more."),
        ('{"kind": "train", "step": 50}', "line 4 (train) lacks samples_seen,"),
        (metrics_lines()[3].replace('"step": 3', '"step": NaN'), "line 4 (train) has no number in"),
    ],
)
def test_damaged_lines_are_left_out_and_the_page_says_so(
    run_dir: Path, bad: str, said: str
) -> None:
    whole = report(run_dir)
    lines = metrics_lines()
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines[:3], bad, *lines[3:]]) + "\n")
    page = report(run_dir)
    assert f"Damaged lines of the metrics are left out: {said}" in page.text
    drawn = [attrs.get("data-points") for _, attrs in page.tags if "data-points" in attrs]
    assert drawn == [a.get("data-points") for _, a in whole.tags if "data-points" in a]


def test_folders_that_are_no_run(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such run"):
        write_report(tmp_path / "nowhere", None, tmp_path / "report.html")
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: no metrics; has the run started"):
        write_report(run_dir, None, tmp_path / "report.html")


@pytest.mark.parametrize("content", ["{", "{}", "[]", "3"])
def test_examples_that_cannot_be_read(run_dir: Path, content: str) -> None:
    (run_dir / "examples.json").write_text(content)
    with pytest.raises(UserError, match=r"examples\.json: .*; run `dist-vse eval` again"):
        write_report(run_dir, None, run_dir / "report.html")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chance", {"rsum": "high"}),
        ("chance", None),
        ("text_to_image", {"key": "k"}),
        ("image_to_text", [{"key": "k", "rank": "first", "answers": []}]),
        ("text_to_image", [{"key": "k", "rank": 1, "answers": None}]),
        ("text_to_image", [{"key": "k", "rank": 1, "answers": [{"score": "x"}]}]),
        ("split", 5),
    ],
)
def test_examples_of_other_types_are_one_line(run_dir: Path, name: str, value: object) -> None:
    path = run_dir / "examples.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=rf"examples\.json: {name} must"):
        write_report(run_dir, None, run_dir / "report.html")


@pytest.mark.parametrize(("name", "value"), [("lr", "x"), ("step", "1"), ("memory_gib", None)])
def test_numbers_of_other_types_are_left_out(run_dir: Path, name: str, value: object) -> None:
    lines = metrics_lines()
    lines[1] = json.dumps(json.loads(lines[1]) | {name: value})
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    page = report(run_dir)
    assert f"left out: line 2 (train) has no number in {name}." in page.text
