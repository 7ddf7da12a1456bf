"""The command line: quick help, one-line errors, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from dist_vse import cli
from tests.support.paths import ROOT

COMMANDS = (
    "shard",
    "train",
    "submit",
    "eval",
    "report",
    "export",
    "embed",
    "search",
    "zeroshot",
    "verify",
    "plan",
    "bench",
)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_loads_nothing_heavy(command: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom dist_vse.cli import main\n"
        f"try:\n    main([*{command!r}, '--help'])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'omegaconf', 'submitit'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: dist-vse" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "error: nowhere.yaml: no such config"),
        (["eval", "nowhere"], "error: nowhere: no run here"),
        (["report", "nowhere"], "error: nowhere"),
        (["shard", "jsonl", "nowhere.jsonl", "out"], "error: nowhere.jsonl"),
    ],
)
def test_a_users_slip_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_overrides_may_stand_behind_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path}/run\n")
    cluster = str(ROOT / "configs" / "clusters" / "local.yaml")
    words = ["submit", str(config), "loss.name=convse", "--cluster", cluster, "seed=9", "--dry-run"]
    assert cli.main(words) == 0
    assert cli.main([*words, "sede=9"]) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err
    for odd in ("seed", "--sede=9"):
        with pytest.raises(SystemExit):
            cli.main([*words, odd])
