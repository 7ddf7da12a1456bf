"""The command lines of the pages pass the parsers that will read them, on the oldest Python too."""

import subprocess

import pytest

from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.tools.verify import cli as verify
from tests.support.doc_commands import DocCommand, check, find_commands, parse
from tests.support.paths import ROOT

COMMANDS = find_commands()


def test_every_command_line_of_the_pages_is_taken() -> None:
    assert len(COMMANDS) > 300
    wrong = {f"{command.page}: {command.line}": check(command) for command in COMMANDS}
    assert {line: why for line, why in wrong.items() if why} == {}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("dist-vse submit CONFIG --clusters FILE", "unrecognized arguments: --clusters"),
        ("dist-vse submit CONFIG --cluster FILE key", "unrecognized arguments: key"),
        ("torchrun --no-python dist-vse evaluate RUN", "invalid choice: 'evaluate'"),
        ("accelerate launch -m dist_vse.cli bench scales", "invalid choice: 'scales'"),
        ("torchrun -m dist_vse.tools.verify c.yaml --peers a", "unrecognized arguments"),
        ("A=1 python -m benchmarks loss --row 4096 --x", "unrecognized arguments: --x"),
        ("python -m benchmarks.mutants --slowly", "benchmarks.mutants has no --slowly"),
        ("python -m demo.nothing", "no file demo/nothing.py"),
        ("sbatch --nodes=2 configs/clusters/none.sbatch CONFIG", "no file configs/clusters/none"),
        ("make tests", "no target tests"),
        ("pytest tests/no_such", "no file tests/no_such"),
        ("dist_vse train", "what is dist_vse?"),
    ],
)
def test_a_wrong_line_is_noticed(line: str, why: str) -> None:
    assert why in check(DocCommand("page.md", line, True))


def test_a_sentence_may_leave_arguments_out_but_invent_none() -> None:
    assert check(DocCommand("page.md", "dist-vse embed", False)) == ""
    assert "arguments are required" in check(DocCommand("page.md", "dist-vse embed", True))
    assert "--split2" in check(DocCommand("page.md", "dist-vse embed --split2 val", False))


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("submit c.yaml --cluster F a=1 --dry-run b=2", ["a=1", "b=2"]),
        ("submit c.yaml a=1 --cluster F b=2", ["a=1", "b=2"]),
        ("verify c.yaml --processes 2 a=1", ["a=1"]),
        ("plan c.yaml --hardware F a=1", ["a=1"]),
        ("features --texts F c.yaml a=1", ["a=1"]),
        ("bench scale c.yaml --rounds 3 a=1 b=2", ["c.yaml", "a=1", "b=2"]),
    ],
)
def test_settings_may_stand_behind_options(line: str, settings: list[str]) -> None:
    args = parse(line.split())
    assert (args.settings if line.startswith("bench") else args.overrides) == settings


def test_the_module_verify_takes_settings_behind_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert verify.main(["none.yaml", "--processes", "2", "a=1"]) == 2
    assert capsys.readouterr().err.startswith("error: none.yaml")


def test_the_settings_of_the_pages_are_real_ones() -> None:
    """Each with the config that stands in the line; without one that is here, by name and type."""
    loaded = set()
    for command in COMMANDS:
        words = command.words()
        if "dist_vse.train" in words:
            words = ["dist-vse", "train", *words[words.index("dist_vse.train") + 1 :]]
        if not command.whole or words[0] != "dist-vse" or "--help" in words:
            continue
        args = parse(words[1:])
        given = getattr(args, "config", None)
        settings = [word for word in getattr(args, "overrides", []) if word != "key=value"]
        config = given if given and (ROOT / given).is_file() else None
        if not settings or (config, *settings) in loaded:
            continue
        loaded.add((config, *settings))
        try:
            load_config(config, settings)
        except UserError as error:
            needs_the_rest = config is None and " needs " in str(error)
            assert needs_the_rest, f"{command.page}: {command.line}: {error}"
    assert len(loaded) > 12


@pytest.mark.slow
def test_the_oldest_python_takes_every_command_line() -> None:
    found = subprocess.run([ROOT / ".ci/oldest_python"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(found.stderr.strip())
    run = (found.stdout.strip(), "-s", "-m", "tests.support.doc_commands")
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Python ") and f": {len(COMMANDS)} command" in done.stdout
