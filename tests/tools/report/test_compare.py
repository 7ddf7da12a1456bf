"""Several runs side by side: what differs, and only what may be compared."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.tools.report import write_comparison
from tests.support.reports import Page, cells, evaluation, metrics_lines, write_result, write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_runs_side_by_side(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("name: convse\n", "name: vse++\n"))
    lines = [json.loads(line) for line in metrics_lines()]
    lines[-1] |= evaluation(0.1).metrics
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Page(write_comparison([run_dir, other], tmp_path / "compare.html"))
    found = cells(page.source)
    assert found["loss.name"] == ["convse", "vse++"]
    assert "seed" not in found and "output_dir" not in found
    rsums = [f"{evaluation(noise).metrics['rsum']:.1f}" for noise in (0.5, 0.1)]
    assert found["sum of the six recalls (rsum)"] == rsums
    assert page.text.count("my <run>") >= 3
    assert page.classes("c1") and page.classes("c2") and not page.classes("c3")
    assert re.search(r"https?:|url\(|@import", page.source) is None
    with pytest.raises(UserError, match="7 runs are too many"):
        write_comparison([run_dir] * 7, tmp_path / "x.html")


def test_a_comparison_matches_split_protocol_and_data(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    write_result(run_dir, "test-step-000001", 8, checkpoint="step-000001")
    write_result(run_dir, "test-coco-1k", 3, protocol="coco-1k")
    sums = [write_result(folder, "test", noise) for folder, noise in ((run_dir, 1), (other, 2))]

    def tables() -> list[tuple[str, list[str], list[str]]]:
        page = Page(write_comparison([run_dir, other], tmp_path / "compare.html"))
        found = []
        for title, body in re.findall(r"<caption>(.*?)</caption>(.*?)</table>", page.source):
            row = cells(body)
            found.append((title, row["checkpoint"], row["sum of the six recalls (rsum)"]))
        return found

    first, *rest = tables()
    assert first == ("Split “test”, trained", ["step-000040"] * 2, sums)
    assert [title for title, _, _ in rest] == [
        "Split “val”, trained",
        "Split “test”, coco-1k, trained",
    ]
    assert rest[1][1] == ["step-000040", ""]

    write_result(run_dir, "test", 1, data="feedbeef01234567")
    write_result(other, "test", 2, data="0badcafe01234567")
    found = {title: rsums for title, _, rsums in tables()}
    assert found["Split “test”, trained, data feedbeef"] == [sums[0], ""]
    assert found["Split “test”, trained, data 0badcafe"] == ["", sums[1]]
