"""Text on its way to a terminal."""

import ast
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.common.log import logger, setup_logging
from dist_vse.common.terminal import (
    MAX_CHARS,
    accept_any_text,
    message,
    one_line,
    plain,
    printable,
    say,
    short,
    without_secrets,
)
from dist_vse.tools.bench import table as bench
from dist_vse.tools.search.found import Found
from dist_vse.tools.search.run import _show
from tests.support.paths import ROOT

ODD = "a [red] balloon [/home] [b]x[/b] :smile: [link=x]y \\[z"


def test_control_characters_are_replaced() -> None:
    given = "a\x1b[2Jb\x07\t\n\u202ec\x9b\r"
    assert printable(given) == "a\ufffd[2Jb\ufffd\t\n\ufffdc\ufffd\ufffd"
    assert one_line(given) == "a\ufffd[2Jb\ufffd \ufffdc\ufffd\ufffd"
    assert printable("\udce9") == "\\udce9"  # of a file's name that is no UTF-8
    assert printable("Käse 猫 👩\u200d🚀") == "Käse 猫 👩\u200d🚀"


def test_the_log_and_errors_hold_none(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    try:
        logger.info("skipped %s", "\x1b]0;title\x07")
    finally:
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
    assert cli.main(["status", "\x1b[2J"]) == 2
    said = capsys.readouterr().err
    assert "skipped" in said and "no such folder" in said and "\x1b" not in said


def test_text_in_a_table_is_no_markup() -> None:
    table = Table(title=plain(ODD))
    table.add_row(plain(ODD))
    shown = io.StringIO()
    Console(file=shown, width=200).print(table)
    assert shown.getvalue().count(ODD) == 2


def test_a_message_is_no_longer_than_a_screen() -> None:
    assert message("x" * MAX_CHARS) == "x" * MAX_CHARS
    cut = message("a" * 100_000 + "the end")
    assert len(cut) < MAX_CHARS + 50 and cut.endswith("the end")


def test_values_are_quoted_short_and_without_bytes() -> None:
    assert short({"bytes": b"\xff" * 5000, "path": "a.jpg"}) == (
        "{'bytes': <5,000 bytes>, 'path': 'a.jpg'}"
    )
    assert len(short("x" * 10_000)) < 100
    assert len(short([["x"] * 1000] * 1000)) < 500


def test_search_and_bench_print_captions_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    _show([Found("[/x] query", ["key[b]"], [0.5], ["turn at [/home]\x1b[31m"])])
    said = capsys.readouterr().out
    assert "[/x] query" in said and "key[b]" in said and "turn at [/home]" in said
    assert "\x1b[31m" not in said
    figures = bench.Table("[red]", ["[/a]"], [["[/b]"]], "[/c]")
    shown = io.StringIO()
    Console(file=shown).print(figures.as_rich())
    assert all(text in shown.getvalue() for text in ("[red]", "[/a]", "[/b]", "[/c]"))


def test_an_error_names_a_path_without_sending_it_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["shard", "folder", "/none\x1b[31m[red]", "/tmp/out"]) == 2
    said = capsys.readouterr().err
    assert "\ufffd[31m[red]" in said and "\x1b" not in said


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("no URL? None", "no URL? None"),
        ("https://host/a.tar", "https://host/a.tar"),
        (
            "see https://u:pw@host:80/a.tar?X-Sig=S&b=1: failed",
            "see https://host:80/a.tar?...: failed",
        ),
        ("s3://KEY:pw@b/a.tar, 'ftp://u@h/b?x'", "s3://b/a.tar, 'ftp://h/b?...'"),
        ("pipe:curl https://h/a.tar?t=S | cat", "pipe:curl https://h/a.tar?... | cat"),
        ("is it http://host/a?", "is it http://host/a?"),
    ],
)
def test_urls_lose_their_secrets(given: str, shown: str) -> None:
    assert without_secrets(given) == shown
    assert (
        str(UserError(given)) == without_secrets(given) == without_secrets(without_secrets(given))
    )
    assert "pw" not in shown and "=S" not in shown


def _printed_raw(path: Path) -> Iterator[str]:
    """Yield the calls of a source file that print what may be text from outside."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        place = f"{path.relative_to(ROOT)}:{node.lineno}"
        if isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{place}: print, not say"
        if name in ("print", "add_row", "add_column"):
            for value in node.args:
                parts = value.values if isinstance(value, ast.JoinedStr) else ()
                if any(isinstance(x, ast.FormattedValue) and not x.format_spec for x in parts):
                    yield f"{place}: {ast.unparse(value)} is markup; say plain(...)"


def test_nothing_is_printed_past_the_helpers() -> None:
    sources = [p for d in ("dist_vse", "launch", "shards") for p in (ROOT / d).rglob("*.py")]
    assert len(sources) > 150
    makers = ("terminal.py", "document.py")  # the helpers; makers of docs pages
    raw = [line for p in sources if p.name not in makers for line in _printed_raw(p)]
    assert not raw, "\n".join(raw)


def test_say_prints_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    say("wrote [red]\x1b[2J", end="!")
    assert capsys.readouterr().out == "wrote [red]\ufffd[2J!"


def test_a_terminal_without_unicode_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(buffer, "ascii", write_through=True))
    accept_any_text()
    say("café ███")
    Console().print(plain("漢字"))
    assert buffer.getvalue() == b"caf? ???\n??\n"
