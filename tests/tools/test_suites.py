"""Other people's benchmarks, run for real on a tiny run and tiny local tasks."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from dist_vse import cli
from dist_vse.data.index import read_index
from dist_vse.data.reader import ShardReader
from dist_vse.evaluation.retrieval import retrieval_metrics
from dist_vse.tools.search.embed import embed_split, open_model
from dist_vse.tools.search.zeroshot import zeroshot
from tests.evaluation.test_sets import write_classes
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


def _write_wds(folder: Path, samples: list[dict[str, bytes]], **texts: str) -> Path:
    """Write a folder in CLIP_benchmark's WebDataset layout."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number, sample in enumerate(samples):
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"s{number:03}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def test_clip_benchmark_finds_what_our_own_commands_find(run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("clip_benchmark", reason="needs the extra `suites`")
    index = read_index(run_dir.parent / "shards")
    reader, model = ShardReader(index, "val", max_open=1), open_model(run_dir)
    split = embed_split(model, index, "val")
    pairs = [
        {
            "png": reader.image(*reader.place(row)),
            "txt": "\n".join(split.captions[2 * row : 2 * row + 2]).encode(),
        }
        for row in range(len(split.keys))
    ]
    classes = write_classes(tmp_path / "classes", each=6)
    names = sorted(path.name for path in classes.iterdir())
    labelled = [
        {"png": file.read_bytes(), "cls": str(number).encode()}
        for number, name in enumerate(names)
        for file in sorted((classes / name).iterdir())
    ]
    retrieval = _write_wds(tmp_path / "pairs", pairs, dataset_type="retrieval")
    how = {"classnames": "\n".join(names), "zeroshot_classification_templates": "a {c}"}
    zero = _write_wds(tmp_path / "shapes", labelled, **how)
    tasks = ["--tasks", str(retrieval), str(zero)]
    assert cli.main(["eval", str(run_dir), "--suite", "clip_benchmark", *tasks]) == 0
    of_pairs, of_shapes = (
        json.loads((run_dir / "suites" / "clip_benchmark" / f"{name}.json").read_text())
        for name in ("pairs", "shapes")
    )
    ours = retrieval_metrics(split.image_features, split.text_features, split.image_of_text)
    for k in (1, 5, 10):
        assert 100 * of_pairs[f"text_retrieval_recall@{k}"] == pytest.approx(ours[f"i2t_r{k}"])
        assert 100 * of_pairs[f"image_retrieval_recall@{k}"] == pytest.approx(ours[f"t2i_r{k}"])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {}\n")
    own = zeroshot(run_dir, data=classes, classes=None, templates=prompts, top=None)
    assert 100 * of_shapes["acc1"] == pytest.approx(own["top1"])
    assert 100 * of_shapes["mean_per_class_recall"] == pytest.approx(own["mean_per_class"])
    assert "acc5" not in of_shapes  # of four classes


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (["--suite", "vtab", "--tasks", "x"], "choose from mteb, clip_benchmark"),
        (["--suite", "clip_benchmark"], "needs --tasks, such as wds/cifar10"),
        (["--suite", "clip_benchmark", "--tasks", "nowhere"], "nowhere: no such folder"),
        (["--suite", "mteb"], "needs --tasks"),
        (["--suite", "mteb", "--tasks", "NoSuchTask"], "mteb knows no"),
    ],
)
def test_what_a_suite_does_not_know_is_one_line(
    run_dir: Path, how: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(run_dir), *how]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
