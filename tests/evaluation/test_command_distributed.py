"""`dist-vse eval` of a small real run: the same bytes from any number of processes."""

import contextlib
from pathlib import Path
from unittest import mock

import pytest

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.evaluation.command import eval_run
from tests.support.distributed import run_distributed
from tests.support.runs import trained_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose split has 26 images of seven captions: seven batches, the last not full."""
    splits: dict[str, int | list[int]] = {"train": 48, "val": [9, 17]}
    more = ["total_steps=4", "optim.lr=2e-3", "chunk_size=4", "global_batch_size=16"]
    return trained_run(tmp_path_factory.mktemp("eval"), splits, *more, captions=7)


def evaluated(run_dir: Path) -> str | None:
    """Evaluate as a rank of the harness, whose process group is there already."""
    with mock.patch("dist_vse.distributed.process_group", contextlib.nullcontext):
        try:
            assert eval_run(run_dir, split="val", data=None, recalls=(1, 3), bootstrap=20) == 0
        except UserError as error:
            return str(error)
    return None


def evaluated_as_collapsed(run_dir: Path) -> str | None:
    with mock.patch("dist_vse.evaluation.retrieval.checks.COLLAPSED", 2.0):
        return evaluated(run_dir)


def test_the_result_is_the_same_file_from_one_two_and_three_processes(run_dir: Path) -> None:
    files = []
    for world_size in (1, 2, 3):
        assert run_distributed(evaluated, world_size, run_dir) == [None] * world_size
        files.append((run_dir / "eval-val.json").read_bytes())
        (run_dir / "eval-val.json").unlink()
    assert files[0] == files[1] == files[2]
    assert b'"i2t_r3"' in files[0] and b'"num_texts": 182' in files[0]


def test_a_collapsed_model_ends_every_rank_alike_and_leaves_no_result(run_dir: Path) -> None:
    first, second = run_distributed(evaluated_as_collapsed, 2, run_dir)
    assert first == second
    assert first.startswith("the image features are all alike") and "\n" not in first
    assert not (run_dir / "eval-val.json").exists()


def test_a_collapsed_model_is_exit_code_2(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dist_vse.evaluation.retrieval.checks.COLLAPSED", 2.0)
    assert cli.main(["eval", str(run_dir), "--split", "val"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: the image features are all alike" in err.splitlines()[-1]
