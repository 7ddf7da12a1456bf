"""`dist-vse bench million`, with fewer pairs: its costs add up, and it sees a wrong gradient."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.tools.bench import million


@pytest.mark.slow
def test_one_step_is_exact_and_its_costs_are_counted(tmp_path: Path) -> None:
    out = tmp_path / "m.json"
    assert cli.main(["bench", "million", "--pairs", "4096", "--out", str(out)]) == 0
    plus, plain = json.loads(out.read_text())["rows"]
    assert (plus["loss"], plain["loss"]) == ("convse++", "convse")
    for row in (plus, plain):
        assert row["pairs"] == 4096 and row["error"] < 1e-5
        # Captions' features are gathered, and their gradients come back.
        assert 1 <= row["sent"] / (2 * 2048 * 64 * 4) < 1.2
        assert row["memory_gib"] < 0.2 and row["seconds"] > 0 and row["cpu_s"] > 0
    assert plain["flop"] == 4 * plus["flop"] == 8 * 4096 * 2048 * 64


@pytest.mark.slow
def test_a_loss_that_fails_costs_nothing_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, right = tmp_path / "m.json", million.run_on_ranks

    def fail_at_convse(fn: Any, world_size: int, *args: Any) -> Any:
        if "convse" in args:
            raise UserError("out of memory")
        return right(fn, world_size, *args)

    monkeypatch.setattr(million, "run_on_ranks", fail_at_convse)
    assert cli.main(["bench", "million", "--pairs", "512", "--out", str(out)]) == 2
    report = json.loads(out.read_text())
    assert [row["loss"] for row in report["rows"]] == ["convse++"]
    assert report["command"].startswith("dist-vse bench million --pairs 512 ")
    assert report["tables"][0]["columns"] == ["one step", "convse++"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convse", "convse++"])
def test_the_check_sees_a_wrong_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = million.TiledLoss.backward

    def wrong(tiled: Any) -> tuple[Tensor, Tensor]:
        rows, columns = right(tiled)
        return rows * 1.001, columns

    row = million.measure_loss(600, 16, name)
    assert row["error"] < 1e-5
    monkeypatch.setattr(million.TiledLoss, "backward", wrong)
    row = million.measure_loss(600, 16, name)
    assert row["error"] > 5e-4


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--pairs", "1001"], "--pairs (1001) must be a multiple of --processes (2)"),
        (["--pairs", "6"], "at least 4 a process"),
        (["--processes", "0"], "--processes (0) must be at least 1"),
        (["--dim", "0"], "--dim (0) must be at least 1"),
        (["--out", "/"], "it is a folder); give a path that can be written"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_hour(
    words: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "million", *words]) == 2
    assert fault in capsys.readouterr().err
