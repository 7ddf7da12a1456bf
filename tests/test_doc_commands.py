"""Every `dist-vse` command of the pages is one that the command line takes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_vse import cli
from tests.test_docs import PAGES

PLACEHOLDER = re.compile(r"\[[^\]=]*(?:=[^\]]*)?\]\s*(?=\s|$)|…|\.\.\.")


def _commands(page: Path) -> Iterator[str]:
    """Yield the commands of a page's blocks of code, continued lines joined, without comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        found = re.match(r"^ *(?:\w+=\S* )*(dist-vse .*)$", line)
        if found and not line.startswith("| "):
            yield found[1].split("  #")[0].split(" # ")[0].strip()


CASES = sorted({(page.name, command) for page in PAGES for command in _commands(page)})


def test_the_pages_have_commands() -> None:
    assert len(CASES) > 60


@pytest.mark.parametrize(("page", "command"), CASES)
def test_the_command_line_takes_it(page: str, command: str) -> None:
    words = shlex.split(PLACEHOLDER.sub("", command.replace("SOURCE", "folder")))[1:]
    try:
        cli._parse(words)
    except SystemExit as end:
        assert end.code == 0, f"{page}: {command}"
