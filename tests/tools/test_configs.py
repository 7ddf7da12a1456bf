"""`dist-vse config`: list, show, copy."""

from pathlib import Path

import pytest

from dist_vse.cli import main
from tests.support.paths import CONFIGS


def test_list_names_every_config_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len([path for path in CONFIGS.rglob("*") if path.is_file()])
    assert any(line.startswith("demo  ") and "OpenMoji" in line for line in lines)
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "local"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "clusters" / "local.yaml").read_text()
    assert main(["config", "show", "dmo"]) == 2
    assert capsys.readouterr().err == (
        "error: dmo: no config that comes with dist_vse; did you mean 'demo'?\n"
    )


def test_copy_writes_a_file_to_change_and_replaces_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (CONFIGS / "demo.yaml").read_bytes()
    for words, path in (
        ([], "demo.yaml"),
        (["new/mine.yaml"], "new/mine.yaml"),
        (["new"], "new/demo.yaml"),
    ):
        assert main(["config", "copy", "demo", *words]) == 0
        assert capsys.readouterr().out == f"wrote {path}\n"
        assert Path(path).read_bytes() == text
    Path("demo.yaml").write_text("seed: 1\n")
    assert main(["config", "copy", "demo"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert Path("demo.yaml").read_text() == "seed: 1\n"
