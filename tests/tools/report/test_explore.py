"""The report's script in a real browser: values, runs, filter and order of examples."""

import json
from pathlib import Path

import pytest

from dist_vse.tools.report import write_comparison, write_report
from tests.support.browser import BROWSER, in_browser
from tests.support.reports import write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="there is no Chromium here: the report's script"),
]


def test_curves_show_their_values_and_examples_are_filtered_and_sorted(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    page = write_report(run_dir, None, run_dir / "report.html")
    found = in_browser(
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
        const dialog = document.querySelector("dialog");
        dialog.querySelector("button").click();  // "Show where it was found"
        found.open = dialog.open;
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
    text, (step, value) = found["first"]
    assert found["focusable"] == 0
    assert text.startswith(f"{step:g}: ") and f"{value:.4g}" in text
    assert found["moved"] is True and found["left"] == ""
    assert found["open"] is False
    assert found["held"] is True and 0 < found["some"] < found["all"] == found["again"]
    drawn = found["drawn"]
    assert isinstance(drawn, list) and found["back"] == drawn
    assert found["worst"] == sorted(drawn, reverse=True) != drawn


def test_an_image_shows_its_neighbours_by_mouse_and_keyboard(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    page = write_report(run_dir, None, run_dir / "report.html")
    near = json.loads((run_dir / "examples.json").read_text("utf-8"))["neighbours"]
    found = in_browser(
        page,
        """
        const image = document.querySelector(".thumb[data-key]");
        const dialog = document.querySelector("dialog");
        const others = () => [...dialog.querySelectorAll(".answers .thumb")];
        found.role = [image.tabIndex, image.getAttribute("role")];
        image.click();
        found.open = dialog.open;
        found.key = image.dataset.key;
        found.near = others().map(other => other.dataset.key);
        found.text = dialog.querySelector(".answers").textContent;
        found.pictures = others().every(other => other.src.startsWith("data:image/"));
        const next = others()[0];
        const press = key => next.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        press("a");
        found.same = others()[0] === next;
        press("Enter");
        found.after = others().map(other => other.dataset.key);
        [...dialog.querySelectorAll("button")].at(-1).click();
        found.closed = !dialog.open;
        """,
    )
    first = near[found["key"]]
    assert found["role"] == [0, "button"] and found["open"] is True and found["pictures"] is True
    assert found["near"] == [other["key"] for other in first] and len(first) == 4
    scores = [f"{other['score']:.2f}".replace("-0.00", "0.00") for other in first]
    assert all(score in found["text"] for score in scores) and "-0.00" not in found["text"]
    assert found["same"] is True
    assert found["after"] == [other["key"] for other in near[first[0]["key"]]]
    assert found["closed"] is True


def test_a_report_of_older_examples_shows_where_an_image_was_found(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    content = json.loads((run_dir / "examples.json").read_text("utf-8"))
    del content["neighbours"]
    (run_dir / "examples.json").write_text(json.dumps(content))
    page = write_report(run_dir, None, run_dir / "report.html")
    script = """
        const image = document.querySelector(".thumb[data-key]");
        image.click();
        found.key = [document.querySelector(".tools input").value, image.dataset.key];
        found.open = document.querySelector("dialog").open;
        """
    found = in_browser(page, script)
    assert found["key"][0] == found["key"][1] and found["open"] is False


def test_a_run_is_hidden_by_its_name_in_the_legend(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        runs.append(write_run(tmp_path / name).rename(tmp_path / f"run-{name}"))
    page = write_comparison(runs, tmp_path / "compare.html")
    found = in_browser(
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
