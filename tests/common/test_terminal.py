"""Text on its way to a terminal."""

import logging

import pytest

from dist_vse import cli
from dist_vse.common.log import logger, setup_logging
from dist_vse.common.terminal import one_line, printable


def test_control_characters_are_replaced() -> None:
    given = "a\x1b[2Jb\x07\t\n\u202ec\x9b\r"
    assert printable(given) == "a\ufffd[2Jb\ufffd\t\n\ufffdc\ufffd\ufffd"
    assert one_line(given) == "a\ufffd[2Jb\ufffd \ufffdc\ufffd\ufffd"
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
