"""Results are JSON, and the pages of docs/benchmarks/ are what is rendered from them."""

import json
from pathlib import Path

from benchmarks.render import PAGES, markdown, render_pages
from benchmarks.result import Result, write_result
from dist_vse.tools.bench.table import Table


def test_the_pages_are_those_of_the_results() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    assert pages == render_pages(), "run `python -m benchmarks render`"


def test_a_table_as_markdown() -> None:
    table = markdown("speed", ["case", "s"], [["a|b", "1.5"], ["c", ""]], "less is better")
    assert table.splitlines() == [
        "**speed**",
        "",
        "| case | s |",
        "| --- | ---: |",
        "| a\\|b | 1.5 |",
        "| c |  |",
        "",
        "less is better",
    ]


def test_measuring_again_keeps_the_title_and_notes_but_no_remark(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    old = {"title": "Speed", "notes": ["one thread"], "remarks": ["twice as fast"], "date": "old"}
    path.write_text(json.dumps(old), encoding="utf-8")
    table = Table("speed", ("case", "s"))
    table.add_row("ours", "1.0")
    write_result(path, "loss", "python -m benchmarks loss", Result({"seconds": [1.0]}, [table]))
    new = json.loads(path.read_text(encoding="utf-8"))
    assert (new["title"], new["notes"]) == ("Speed", ["one thread"])
    assert "remarks" not in new and new["date"] != "old"
    assert new["tables"] == [
        {"title": "speed", "columns": ["case", "s"], "rows": [["ours", "1.0"]], "note": ""}
    ]
    assert new["machine"]["cores"] >= 1 and new["versions"]["torch"]
    assert new["command"] == "python -m benchmarks loss"
