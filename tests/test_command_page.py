"""The page of the command line shows the code as it is."""

from tests.support.command_page import page
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "reference" / "cli.md"


def test_the_page_of_commands_is_up_to_date() -> None:
    fresh = page()
    assert fresh.count("\n## `dist-vse ") >= 15 and "`--max-bad N or P%`" in fresh
    assert PAGE.read_text(encoding="utf-8") == fresh, (
        "run python -m tests.support.command_page > docs/reference/cli.md"
    )


def test_what_a_page_would_take_for_its_own_is_escaped() -> None:
    for line in page().splitlines():
        cells = line.replace("\\|", "").split("`")[::2]  # outside of code
        assert not any("<" in cell or "{" in cell for cell in cells), line
        if line.startswith("| "):
            assert line.replace("\\|", "").count("|") == 3, line
