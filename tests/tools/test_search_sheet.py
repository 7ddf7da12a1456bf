"""The sheet of `dist-vse search` in a real browser: filter, order, neighbours; nothing fetched."""

import re
from pathlib import Path

import pytest

from dist_vse.tools.search.found import Found
from dist_vse.tools.search.sheet import write_sheet
from tests.support.browser import BROWSER, in_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="there is no Chromium here: the sheet's script"),
]
NAMES = {"k1": "a red <apple>", "k2": 'a "green" pear', "k3": "blue sky", "k4": "an apple tree"}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwAD"
    "hgGAWjR9awAAAABJRU5ErkJggg=="
)


def _found(query: str, *pairs: tuple[str, float]) -> Found:
    keys, scores = [key for key, _ in pairs], [score for _, score in pairs]
    return Found(query, keys, scores, [NAMES[key] for key in keys])


def test_answers_are_filtered_sorted_and_have_neighbours(tmp_path: Path) -> None:
    page = tmp_path / "found.html"
    found = [
        _found("fruit", ("k1", 0.9), ("k2", 0.8), ("k3", 0.1)),
        _found("sky", ("k3", 0.7), ("k2", 0.2)),
    ]
    near = {key: [{"key": "k4", "score": 0.5}] for key in ("k1", "k2", "k3")}
    write_sheet(page, found, dict.fromkeys(NAMES, PIXEL), set(), near, NAMES)
    assert not re.search(r'(?:src|href)="(?!data:)', page.read_text("utf-8"))
    seen = in_browser(
        page,
        """
        const [word, least] = document.querySelectorAll(".tools input");
        const order = document.querySelector(".tools select");
        const count = document.querySelector(".tools output");
        const keys = () => [...document.querySelectorAll(".found")].map(list =>
          [...list.children].filter(answer => !answer.hidden).map(answer => answer.dataset.key));
        const put = (input, value) => {
          input.value = value;
          input.dispatchEvent(new Event("input"));
          return [keys(), count.textContent];
        };
        found.all = keys();
        found.apple = put(word, "APPLE");
        found.hidden = document.querySelectorAll(".examples > li[hidden]").length;
        put(word, "");
        found.high = put(least, "0.75");
        put(least, least.min);
        order.value = "caption";
        order.dispatchEvent(new Event("change"));
        found.by_caption = keys();
        order.value = "place";
        order.dispatchEvent(new Event("change"));
        found.again = keys();
        document.querySelector('.found .thumb[data-key="k3"]').click();
        const dialog = document.querySelector("dialog");
        found.near = [dialog.open, dialog.textContent];
        dialog.querySelector("button").click();
        found.where = keys();
        """,
    )
    everything = [["k1", "k2", "k3"], ["k3", "k2"]]
    assert seen["all"] == seen["again"] == everything
    assert seen["apple"] == [[["k1"], []], "1 of 5 answers, from 0.10"] and seen["hidden"] == 1
    assert seen["high"] == [[["k1", "k2"], []], "2 of 5 answers, from 0.75"]
    assert seen["by_caption"] == [["k2", "k1", "k3"], ["k2", "k3"]]
    assert seen["near"][0] is True and "Nearest to blue sky" in seen["near"][1]
    assert "an apple tree0.50" in seen["near"][1]
    assert seen["where"] == [["k3"], ["k3"]]
