"""The report's script in a real browser: values, runs, filter and order of examples."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from dist_vse.tools.report import write_comparison, write_report
from tests.support.reports import write_run

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="there is no Chromium here: the report's script"),
]


def _in_browser(page: Path, script: str) -> dict[str, object]:
    """Open the page, run `script` (it fills `found`), and return what it found."""
    reads = f"<script>const found = {{}}; {script}; document.title = JSON.stringify(found)</script>"
    opened = page.with_name("opened.html")
    opened.write_text(page.read_text("utf-8").replace("</body>", f"{reads}</body>"), "utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    made = subprocess.run(
        [BROWSER, *flags, opened.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    title = re.search(r"<title>(.*?)</title>", made.stdout, re.DOTALL)
    assert title is not None, made.stderr
    return dict(json.loads(unescape(title[1])))


def test_curves_show_their_values_and_examples_are_filtered_and_sorted(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    page = write_report(run_dir, None, run_dir / "report.html")
    found = _in_browser(
        page,
        """
        const svg = document.querySelector("svg[data-axis]"), values = svg.nextElementSibling;
        const key = name => svg.dispatchEvent(new KeyboardEvent("keydown", {key: name}));
        const first = JSON.parse(svg.querySelector("[data-points]").dataset.points)[0];
        found.focusable = svg.tabIndex;
        key("Home");
        found.first = [values.textContent, first];
        key("ArrowRight");
        found.moved = values.textContent !== found.first[0];
        svg.dispatchEvent(new Event("blur"));
        found.left = values.textContent;

        const word = document.querySelector(".tools input");
        const shown = () => [...document.querySelectorAll(".examples > li")].filter(q => !q.hidden);
        found.all = shown().length;
        document.querySelector(".thumb[data-key]").click();
        found.key = word.value;
        found.held = shown().every(q => q.innerHTML.includes(`data-key="${word.value}"`));
        found.some = shown().length;
        word.value = "";
        word.dispatchEvent(new Event("input"));
        found.again = shown().length;
        const list = document.querySelector(".examples");
        const ranks = () => [...list.children].map(q => Number(q.dataset.rank));
        found.drawn = ranks();
        document.querySelector(".tools button").click();
        found.worst = ranks();
        document.querySelector(".tools button").click();
        found.back = ranks();
        """,
    )
    text, (step, value) = found["first"]  # type: ignore[misc]
    assert found["focusable"] == 0
    assert text.startswith(f"{step:g}: ") and f"{value:.4g}" in text
    assert found["moved"] is True and found["left"] == ""
    assert found["held"] is True and 0 < found["some"] < found["all"] == found["again"]  # type: ignore[operator]
    drawn = found["drawn"]
    assert isinstance(drawn, list) and found["back"] == drawn
    assert found["worst"] == sorted(drawn, reverse=True) != drawn


def test_a_run_is_hidden_by_its_name_in_the_legend(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        runs.append(write_run(tmp_path / name).rename(tmp_path / f"run-{name}"))
    page = write_comparison(runs, tmp_path / "compare.html")
    found = _in_browser(
        page,
        """
        const button = document.querySelector("h1 + .legend button");
        const hidden = () => document.querySelectorAll("path.line.c1.off[data-points]").length;
        found.lines = document.querySelectorAll("path.line.c1[data-points]").length;
        button.click();
        found.pressed = button.getAttribute("aria-pressed");
        found.hidden = hidden();
        found.others = document.querySelectorAll("path.line.c2.off").length;
        button.click();
        found.again = hidden();
        """,
    )
    assert found["pressed"] == "false" and found["others"] == 0 and found["again"] == 0
    assert found["hidden"] == found["lines"] != 0
