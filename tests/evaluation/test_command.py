"""`dist-vse eval`: which files it writes, and what it calls its columns."""

import json
import shutil
from pathlib import Path

import pytest

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.config import TrainConfig
from dist_vse.config.sections import ModelConfig
from dist_vse.data.index import read_index
from dist_vse.evaluation.command import eval_run
from dist_vse.tools.report import write_report
from tests.support.datasets import write_dataset
from tests.support.runs import trained_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": [60, 50, 40], "val": [8]}
    return trained_run(tmp_path_factory.mktemp("run"), splits, "total_steps=2", "log_every=1")


def test_results_on_other_data_stay_apart(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, run)
    assert eval_run(run, split="val", data=None) == 0
    assert "untrained" in capsys.readouterr().out
    kept = {name: (run / name).read_bytes() for name in ("eval-val.json", "examples.json")}
    write_dataset(other, {"val": [5]})
    assert eval_run(run, split="val", data=str(other)) == 0
    assert {name: (run / name).read_bytes() for name in kept} == kept
    found = read_index(other).fingerprint()
    assert f"data {found[:8]}" in " ".join(capsys.readouterr().out.split())
    apart = json.loads((run / f"eval-val-{found[:8]}.json").read_text())
    assert apart["data"] == found and apart["trained"]["num_images"] == 5
    page = write_report(run, None, run / "report.html").read_text()
    assert "Results are on 8 images" in page
    assert f"Split “val”, step-000002, data {found[:8]}" in page

    copy = tmp_path / "copy"  # the same data at another place are the run's own
    shutil.copytree(trained.parent / "shards", copy)
    assert eval_run(run, split="val", data=str(copy)) == 0
    assert len(list(run.glob("eval-*.json"))) == 2


def test_a_place_that_cannot_be_written_is_reported_before_the_work(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "eval-val.json").mkdir()
    monkeypatch.setattr("dist_vse.evaluation.command.evaluate", None)
    with pytest.raises(UserError, match=r"eval-val\.json: can't be written \(.*it is a folder"):
        eval_run(run, split="val", data=None)


def test_a_run_from_a_checkpoint_has_no_untrained_model() -> None:
    assert TrainConfig().before_name == "untrained"
    assert TrainConfig(model=ModelConfig(pretrained="clip")).before_name == "start"


def test_several_runs_take_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "a", "b", "--data", "c"]) == 2
    assert capsys.readouterr().err.startswith("error: --data is for the images of one run's report")
