"""Other people's benchmarks, run for real on a tiny run and tiny local tasks."""

import json
from pathlib import Path

import pytest

from dist_vse import cli
from dist_vse.tools.search.embed import open_model
from tests.support.runs import trained_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = ["total_steps=4", "optim.lr=2e-3", "chunk_size=8", "global_batch_size=16"]
    return trained_run(tmp_path_factory.mktemp("suites"), {"train": 48, "val": 16}, *more)


def test_mteb_retrieves_on_tasks_of_images_and_texts(run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("mteb", reason="needs the extra `suites`")
    from mteb.mocks.mock_tasks.retrieval import MockAny2AnyRetrievalT2ITask
    from mteb.mocks.mock_tasks.zeroshot_classification import MockZeroShotClassificationTask

    from dist_vse.tools.suites.mteb import evaluate

    tasks = [MockAny2AnyRetrievalT2ITask(), MockZeroShotClassificationTask()]
    found = evaluate(open_model(run_dir), tasks, tmp_path)
    assert len(found) == 2
    for name, metrics in found.items():
        assert 0 <= metrics["main_score"] <= 1
        assert json.loads((tmp_path / f"{name}.json").read_text())["scores"]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (["--suite", "vtab", "--tasks", "x"], "choose from mteb"),
        (["--suite", "mteb"], "needs --tasks"),
        (["--suite", "mteb", "--tasks", "NoSuchTask"], "mteb knows no"),
    ],
)
def test_what_a_suite_does_not_know_is_one_line(
    run_dir: Path, how: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(run_dir), *how]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
