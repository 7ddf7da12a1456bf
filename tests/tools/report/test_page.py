"""The report of a small run: one self-contained page that says what it shows."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.config import dump_config, load_config
from dist_vse.config.evaluation import EvalSetConfig
from dist_vse.data.index import read_index
from dist_vse.evaluation.examples import save_examples
from dist_vse.tools.report import write_comparison, write_report
from tests.support.datasets import write_dataset
from tests.support.reports import (
    Page,
    cells,
    evaluation,
    metrics_lines,
    report,
    write_environment,
    write_result,
    write_run,
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_page_is_whole_and_needs_nothing_else(run_dir: Path) -> None:
    out = run_dir / "new" / "report.html"
    assert write_report(run_dir, None, out) == out
    page = Page(out)
    assert "my <run>" in page.text
    assert "<run>" not in page.source  # escaped
    assert "text <0> & more" in page.text
    for metrics in (evaluation(0.5).metrics, evaluation(9).metrics):
        assert f"{metrics['rsum']:.1f}" in page.text
    titles = ("Loss", "Recall", "Throughput", "Memory", "Temperature", "Learning rate")
    assert all(title in page.text for title in titles)
    assert sum(tag == "svg" and "role" in attrs for tag, attrs in page.tags) == len(titles)
    assert "global_batch_size: 256" in page.text

    assert not {"link", "iframe"} & {tag for tag, _ in page.tags}
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{}]  # its own, inline
    sources = [attrs["src"] for _, attrs in page.tags if attrs.get("src")]
    assert all(source and source.startswith("data:image/") for source in sources)
    assert re.search(r"https?:|url\(|@import", page.source) is None
    assert list(out.parent.iterdir()) == [out]  # no temporary file stays


def test_marks_the_right_answers(run_dir: Path) -> None:
    examples = json.loads((run_dir / "examples.json").read_text())
    page = report(run_dir)
    queries = examples["text_to_image"]
    right = [sum(answer["right"] for answer in query["answers"]) for query in queries]
    captions = sum(a["right"] for q in examples["image_to_text"] for a in q["answers"])
    assert 0 < sum(right) < len(right)  # the fixture has hits and misses
    assert page.classes("check") == sum(right)
    assert page.classes("missed") == right.count(0)
    assert page.classes("right") == sum(right) + captions
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 6 * 3 + right.count(0) + 6
    of_key = {(image["alt"], image["src"]) for image in images}
    assert len(of_key) == len({key for key, _ in of_key}) == 6  # each key its own picture


def test_shows_what_was_found_at_once_and_what_last(run_dir: Path) -> None:
    save_examples(evaluation(1.5), run_dir / "examples.json", split="val", k=3)
    examples = json.loads((run_dir / "examples.json").read_text())
    page = report(run_dir)
    assert "Found at once" in page.text
    late = page.text[page.text.index("Found last") :]
    for query in examples["text_to_image_worst"]:
        assert query["rank"] > 1 and query["caption"] in late
    latest = evaluation(1.5).text_ranks.sort(descending=True).values[:4].tolist()
    assert [query["rank"] for query in examples["text_to_image_worst"]] == latest
    assert latest[0] > latest[-1]  # or any four would do


def test_software_and_machine_are_those_of_the_run(run_dir: Path) -> None:
    page = report(run_dir)
    assert "Software" not in page.text  # the run recorded nothing, and nothing is made up
    line = {"step": 0, "versions": {"torch": "1.2.3"}, "machine": {"cores": 2}, "data": {"d": "ab"}}
    (run_dir / "environment.jsonl").write_text(json.dumps(line) + "\n")
    page = report(run_dir)
    assert "Software of the run" in page.text and "1.2.3" in page.text


def test_shows_the_untrained_model_the_trained_one_and_chance(run_dir: Path) -> None:
    page = report(run_dir)
    found = cells(page.source)
    trained, untrained = evaluation(0.5).metrics["rsum"], evaluation(9).metrics["rsum"]
    chance = json.loads((run_dir / "examples.json").read_text())["chance"]["rsum"]
    assert found["sum of the six recalls (rsum)"] == [
        f"{value:.1f}" for value in (untrained, trained, chance)
    ]


def test_shows_other_splits_that_were_evaluated(run_dir: Path) -> None:
    trained = evaluation(0.1).metrics
    content = {"split": "test", "checkpoint": "step-40", "trained": trained}
    (run_dir / "eval-test.json").write_text(json.dumps(content))
    page = report(run_dir)
    assert "Split “test”, step-40" in page.text
    assert "Split “val”, step 40" in page.text
    assert page.text.index("“test”, step-40") < page.text.index("“val”, step 40")


def test_the_plain_result_of_the_newest_checkpoint_comes_first(run_dir: Path) -> None:
    write_environment(run_dir, "feedbeef01234567")
    data = {"data": "feedbeef01234567"}
    write_result(run_dir, "test-0badcafe", 0.01, data="0badcafe01234567")
    write_result(run_dir, "test-coco-1k", 0.2, protocol="coco-1k", **data)
    write_result(run_dir, "test-step-000001", 8, checkpoint="step-000001", **data)
    write_result(run_dir, "val-step-000001", 7, checkpoint="step-000001", split="val", **data)
    newest = write_result(run_dir, "test", 1, **data)
    page = report(run_dir)
    assert f"<dd>{newest}" in page.source
    assert "of the split “test”, at step-000040" in page.text
    titles = re.findall(r"<caption>(.*?)</caption>", page.source)
    assert titles == [
        "Split “test”, step-000040",
        "Split “val”, step 40",
        "Split “test”, step-000001",
        "Split “val”, step-000001",
        "Split “test”, coco-1k, step-000040",
        "Split “test”, step-000040, data 0badcafe",
    ]
    write_result(run_dir, "val", 1, split="val", **data)  # measures again what training did
    page = report(run_dir)
    assert "Split “val”, step 40" not in page.text


def test_the_fingerprint_is_that_of_the_training(run_dir: Path) -> None:
    own = read_index(run_dir.parent / "data").fingerprint()
    write_environment(run_dir, own)
    page = report(run_dir)
    assert f"Fingerprint in training {own}" in page.text and "Fingerprint now" not in page.text
    write_environment(run_dir, "feedbeef01234567")
    page = report(run_dir)
    assert "Fingerprint in training feedbeef01234567" in page.text
    assert f"Fingerprint now {own}: not what was trained on" in page.text


def test_a_run_from_a_checkpoint_has_a_start(run_dir: Path) -> None:
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("pretrained: null", "pretrained: clip"))
    page = report(run_dir)
    assert '<th scope="col">start</th>' in page.source and "untrained" not in page.text


@pytest.mark.parametrize("several", [False, True])
def test_a_page_that_cannot_be_written(
    run_dir: Path, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dist_vse.tools.report.page.thumbnails", None
    )  # reported before the images are read
    (run_dir / "file").touch()
    (run_dir / "folder").mkdir()
    for out in (run_dir / "file" / "page.html", run_dir / "folder"):
        with pytest.raises(
            UserError, match=r"can't be written \(.*; give a path that can be written"
        ):
            if several:
                write_comparison([run_dir, run_dir], out)
            else:
                write_report(run_dir, None, out)
    assert not list(run_dir.glob("*.tmp"))


def test_shows_intervals_where_they_were_drawn_and_nothing_where_a_figure_is_unknown(
    run_dir: Path,
) -> None:
    trained = evaluation(0.1).metrics
    old = {name: value for name, value in trained.items() if not name.endswith("_map")}
    content = {"split": "test", "checkpoint": "step-40", "trained": old}
    content["intervals"] = {"i2t_r5": [12.34, 56.78]}
    (run_dir / "eval-test.json").write_text(json.dumps(content))
    shown = f"{trained['i2t_r5']:.1f} [12.3, 56.8]"
    for page in (
        report(run_dir),
        Page(write_comparison([run_dir, run_dir], run_dir / "report.html")),
    ):
        assert shown in page.text
        assert page.text.count("mAP@R, %") >= 2


def test_says_that_the_images_are_not_at_hand(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "moved")
    page = report(run_dir)
    assert "The data set is not at hand" in page.text
    assert "val000003" in page.text
    assert not any(tag == "img" for tag, _ in page.tags)
    page = Page(write_report(run_dir, tmp_path / "moved", run_dir / "report.html"))
    assert "not at hand" not in page.text


def test_another_data_set(run_dir: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", {"val": 2})
    with pytest.raises(UserError, match=r"split 'val' lacks 4 .* such as 'val000002'; give the"):
        write_report(run_dir, tmp_path / "other", run_dir / "report.html")
    with pytest.raises(UserError, match="no such index"):
        write_report(run_dir, tmp_path / "nowhere", run_dir / "report.html")


def _with_further_sets(run_dir: Path) -> None:
    """Add what a run with `eval_sets` and `eval_loss` would have logged."""
    sets = [
        {"name": "a <b>", "split": "dev", "protocol": "coco-1k", "index": "x"},
        {"name": "shapes", "zeroshot": "images"},
        {"name": "later", "split": "test"},  # of a run that was given it, but not yet measured it
    ]
    config = load_config(run_dir / "config.yaml")
    items = [EvalSetConfig(**item) for item in sets]
    (run_dir / "config.yaml").write_text(dump_config(replace(config, eval_sets=items)))
    lines = [json.loads(line) for line in metrics_lines()]
    for line, noise, loss in ((lines[0], 9, 4.25), (lines[-1], 0.2, 1.0625)):
        line |= {f"a <b>/{k}": v for k, v in evaluation(noise).metrics.items()}
        line |= {"shapes/top1": 30 / loss, "shapes/mean_per_class": 7.0, "shapes/chance": 12.5}
        line["val_loss"] = loss
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_further_sets_and_the_validation_loss_have_tables_and_curves(run_dir: Path) -> None:
    plain = report(run_dir)
    assert "Further sets" not in plain.text and "validation" not in plain.text
    _with_further_sets(run_dir)
    page = report(run_dir)
    tables = dict(re.findall(r"<caption>(.*?)</caption>(.*?)</table>", page.source))
    assert list(tables)[1:] == [
        "“a &lt;b&gt;”: split “dev”, coco-1k",
        "“shapes”: zero-shot classification",
        "Validation loss, split “val”",
    ]
    of_split, of_classes, of_loss = (cells(body) for body in list(tables.values())[1:])
    rsums = [f"{evaluation(noise).metrics['rsum']:.1f}" for noise in (9, 0.2)]
    assert of_split["sum of the six recalls (rsum)"] == rsums
    assert of_classes["top 1, %"] == ["7.1", "28.2", "12.5"]
    assert of_classes.keys() == {"top 1, %", "mean per class, %"}  # of too few for the first five
    assert of_loss["mean over global batches"] == ["4.250", "1.062"]
    charts = re.findall(r"<h3>(.*?)</h3>.*?aria-label=\"(.*?)\"", page.source)
    assert [title for title, _ in charts[:4]] == ["Loss", "Recall", "a &lt;b&gt;", "shapes"]
    assert "validation from 4.25 to 1.06" in charts[0][1] and "training from" in charts[0][1]
    assert "top 1 from 7.06 to 28.2; mean per class from 7 to 7" in charts[3][1]


def test_a_comparison_shows_them_of_every_run_that_has_them(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    _with_further_sets(other)
    page = Page(write_comparison([run_dir, other], tmp_path / "both.html"))
    tables = dict(re.findall(r"<caption>(.*?)</caption>(.*?)</table>", page.source))
    of_classes = cells(tables["“shapes”: zero-shot classification, last evaluation"])
    assert of_classes["top 1, %"] == ["", "28.2"]
    loss = cells(tables["Validation loss, split “val”, last evaluation"])
    assert loss["mean over global batches"] == ["", "1.062"]
    assert "<h3>Validation loss</h3>" in page.source
