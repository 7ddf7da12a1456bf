"""The report of a small run: complete, self-contained, and clear where a file is wrong."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from dist_vse.config import DataConfig, TrainConfig, dump_config
from dist_vse.errors import UserError
from dist_vse.evaluate import Embedded, Evaluation, score
from dist_vse.examples import save_examples
from dist_vse.index import read_index
from dist_vse.report import write_comparison, write_report
from tests.datasets import write_dataset

VOID = {"meta", "img", "link"}


class Page(html.parser.HTMLParser):
    """Collects tags and text; fails on tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def classes(self, name: str) -> int:
        return sum(name in (attrs.get("class") or "").split() for _, attrs in self.tags)


def evaluation(noise: float) -> Evaluation:
    """Six images with two texts each, the better found the less noise there is."""
    generator = torch.Generator().manual_seed(0)
    of_text = torch.arange(12) // 2
    images = torch.nn.functional.normalize(torch.randn(6, 8, generator=generator))
    texts = images[of_text] + noise * torch.randn(12, 8, generator=generator)
    texts = torch.nn.functional.normalize(texts)
    keys = [f"val{i:06d}" for i in range(6)]
    captions = [f"text <{j}> & more" for j in range(12)]
    ids = torch.arange(6), torch.arange(12)
    return score(Embedded(keys, captions, images, texts, of_text, *ids), torch.device("cpu"))


def metrics_lines() -> list[str]:
    lines: list[dict[str, object]] = [
        {"kind": "eval", "step": 0, "samples_seen": 0, "split": "val", **evaluation(9).metrics}
    ]
    for step in range(1, 41):
        numbers = {"loss": 10 / step, "lr": 1e-3 / step, "pairs_per_s": 1500.0 + step}
        numbers |= {"memory_gib": 1.25, "temperature": 0.1}
        lines.append({"kind": "train", "step": step, "samples_seen": 64 * step, **numbers})
    last = {"samples_seen": 2560, "split": "val", **evaluation(0.5).metrics}
    lines.append({"kind": "eval", "step": 40, **last})
    return [json.dumps(line) for line in lines]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    write_dataset(data, {"val": [4, 2], "test": 3})
    path = tmp_path / "my <run>"
    path.mkdir()
    config = TrainConfig(output_dir=str(path), total_steps=40, data=DataConfig(index=str(data)))
    (path / "config.yaml").write_text(dump_config(config))
    (path / "metrics.jsonl").write_text("\n".join(metrics_lines()) + "\n")
    how = {"split": "val", "num_queries": 6, "num_extremes": 0, "k": 3}
    save_examples(evaluation(1.5), path / "examples.json", **how)  # type: ignore[arg-type]
    return path


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

    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    sources = [attrs["src"] for _, attrs in page.tags if attrs.get("src")]
    assert all(source and source.startswith("data:image/") for source in sources)
    assert re.search(r"https?:|url\(|@import", page.source) is None
    assert list(out.parent.iterdir()) == [out]  # no temporary file stays


def test_marks_the_right_answers(run_dir: Path) -> None:
    examples = json.loads((run_dir / "examples.json").read_text())
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
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
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
    assert "Found at once" in page.text
    late = page.text[page.text.index("Found last") :]
    for query in examples["text_to_image_worst"]:
        assert query["rank"] > 1 and query["caption"] in late
    latest = evaluation(1.5).text_ranks.sort(descending=True).values[:4].tolist()
    assert [query["rank"] for query in examples["text_to_image_worst"]] == latest
    assert latest[0] > latest[-1]  # or any four would do


def test_software_and_machine_are_those_of_the_run(run_dir: Path) -> None:
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
    assert "Software" not in page.text  # an older run told nothing, and nothing is made up
    line = {"step": 0, "versions": {"torch": "1.2.3"}, "machine": {"cores": 2}, "data": {"d": "ab"}}
    (run_dir / "environment.jsonl").write_text(json.dumps(line) + "\n")
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
    assert "Software of the run" in page.text and "1.2.3" in page.text


def test_runs_side_by_side(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("name: convse\n", "name: vse++\n"))
    lines = [json.loads(line) for line in metrics_lines()]
    lines[-1] |= evaluation(0.1).metrics
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Page(write_comparison([run_dir, other], tmp_path / "compare.html"))
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', page.source)
    cells = {label: re.findall(r"<td.*?>(.*?)</td>", row) for label, row in rows}
    assert cells["loss.name"] == ["convse", "vse++"]
    assert "seed" not in cells and "output_dir" not in cells
    rsums = [f"{evaluation(noise).metrics['rsum']:.1f}" for noise in (0.5, 0.1)]
    assert cells["sum of the six recalls (rsum)"] == rsums
    assert page.text.count("my <run>") >= 3
    assert page.classes("c1") and page.classes("c2") and not page.classes("c3")
    assert re.search(r"https?:|url\(|@import", page.source) is None
    with pytest.raises(UserError, match="7 runs are too many"):
        write_comparison([run_dir] * 7, tmp_path / "x.html")


def test_shows_the_untrained_model_the_trained_one_and_chance(run_dir: Path) -> None:
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', page.source)
    cells = {label: re.findall(r"<td.*?>(.*?)</td>", row) for label, row in rows}
    trained, untrained = evaluation(0.5).metrics["rsum"], evaluation(9).metrics["rsum"]
    chance = json.loads((run_dir / "examples.json").read_text())["chance"]["rsum"]
    assert cells["sum of the six recalls (rsum)"] == [
        f"{value:.1f}" for value in (untrained, trained, chance)
    ]


def test_shows_other_splits_that_were_evaluated(run_dir: Path) -> None:
    trained = evaluation(0.1).metrics
    content = {"split": "test", "checkpoint": "step-40", "trained": trained}
    (run_dir / "eval-test.json").write_text(json.dumps(content))
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
    assert "Split “test”, step-40" in page.text
    assert "Split “val”, step 40" in page.text
    assert page.text.index("“test”, step-40") < page.text.index("“val”, step 40")


def write_result(run_dir: Path, name: str, noise: float, **more: object) -> str:
    """Write what `dist-vse eval` would; return its rsum as the page shows it."""
    metrics = evaluation(noise).metrics
    content = {"split": "test", "checkpoint": "step-000040", "trained": metrics, **more}
    (run_dir / f"eval-{name}.json").write_text(json.dumps(content))
    return f"{metrics['rsum']:.1f}"


def write_environment(run_dir: Path, fingerprint: str) -> None:
    line = {"step": 0, "versions": {}, "machine": {}}
    data = {str(run_dir.parent / "data"): fingerprint}
    (run_dir / "environment.jsonl").write_text(json.dumps({**line, "data": data}) + "\n")


def test_the_plain_result_of_the_newest_checkpoint_comes_first(run_dir: Path) -> None:
    write_environment(run_dir, "feedbeef01234567")
    data = {"data": "feedbeef01234567"}
    write_result(run_dir, "test-0badcafe", 0.01, data="0badcafe01234567")
    write_result(run_dir, "test-coco-1k", 0.2, protocol="coco-1k", **data)
    write_result(run_dir, "test-step-000001", 8, checkpoint="step-000001", **data)
    write_result(run_dir, "val-step-000001", 7, checkpoint="step-000001", split="val", **data)
    newest = write_result(run_dir, "test", 1, **data)
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
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
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
    assert "Split “val”, step 40" not in page.text


def test_a_comparison_matches_split_protocol_and_data(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    write_result(run_dir, "test-step-000001", 8, checkpoint="step-000001")
    write_result(run_dir, "test-coco-1k", 3, protocol="coco-1k")
    sums = [write_result(folder, "test", noise) for folder, noise in ((run_dir, 1), (other, 2))]

    def tables() -> list[tuple[str, list[str], list[str]]]:
        page = Page(write_comparison([run_dir, other], tmp_path / "compare.html"))
        found = []
        for title, body in re.findall(r"<caption>(.*?)</caption>(.*?)</table>", page.source):
            rows = dict(re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', body))
            cells = {label: re.findall(r"<td.*?>(.*?)</td>", row) for label, row in rows.items()}
            rsums = cells["sum of the six recalls (rsum)"]
            found.append((title, cells["checkpoint"], rsums))
        return found

    first, *rest = tables()
    assert first == ("Split “test”, trained", ["step-000040"] * 2, sums)
    assert [title for title, _, _ in rest] == [
        "Split “val”, trained",
        "Split “test”, coco-1k, trained",
    ]
    assert rest[1][1] == ["step-000040", ""]

    write_result(run_dir, "test", 1, data="feedbeef01234567")
    write_result(other, "test", 2, data="0badcafe01234567")
    found = {title: rsums for title, _, rsums in tables()}
    assert found["Split “test”, trained, data feedbeef"] == [sums[0], ""]
    assert found["Split “test”, trained, data 0badcafe"] == ["", sums[1]]


def test_the_fingerprint_is_that_of_the_training(run_dir: Path) -> None:
    own = read_index(run_dir.parent / "data").fingerprint()
    write_environment(run_dir, own)
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
    assert f"Fingerprint in training {own}" in page.text and "Fingerprint now" not in page.text
    write_environment(run_dir, "feedbeef01234567")
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
    assert "Fingerprint in training feedbeef01234567" in page.text
    assert f"Fingerprint now {own}: not what was trained on" in page.text


def test_a_run_from_a_checkpoint_has_a_start(run_dir: Path) -> None:
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("pretrained: null", "pretrained: clip"))
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
    assert '<th scope="col">start</th>' in page.source and "untrained" not in page.text


@pytest.mark.parametrize("several", [False, True])
def test_a_page_that_cannot_be_written(
    run_dir: Path, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_vse.report.page.thumbnails", None)  # told before the images are read
    (run_dir / "file").touch()
    (run_dir / "folder").mkdir()
    for out in (run_dir / "file" / "page.html", run_dir / "folder"):
        with pytest.raises(UserError, match=r"can't be written \(.*; give a place"):
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
        Page(write_report(run_dir, None, run_dir / "report.html")),
        Page(write_comparison([run_dir, run_dir], run_dir / "report.html")),
    ):
        assert shown in page.text
        assert page.text.count("mAP@R, %") >= 2


def test_a_run_that_has_just_begun(run_dir: Path) -> None:
    (run_dir / "examples.json").unlink()
    (run_dir / "metrics.jsonl").write_text("\n".join(metrics_lines()[:2]) + "\n")
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
    assert "untrained" in page.text
    assert page.classes("trained") == page.classes("thumb") == 0


def test_says_that_the_images_are_not_at_hand(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "moved")
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
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


def test_a_last_line_cut_by_a_kill_is_left_out(run_dir: Path) -> None:
    whole = Page(write_report(run_dir, None, run_dir / "report.html"))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ste')
    assert Page(write_report(run_dir, None, run_dir / "report.html")).text == whole.text


def test_a_step_that_ran_twice_counts_once(run_dir: Path) -> None:
    lines = metrics_lines()
    again = json.dumps(json.loads(lines[1]) | {"pairs_per_s": 9e9})
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines[:2], again, lines[-1]]))
    page = Page(write_report(run_dir, None, run_dir / "report.html"))
    assert "9,000,000,000 pairs/s" in page.text  # the median of the later line alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "has no train line yet"),
        (lambda lines: lines[1:3], "has no eval line yet"),
        (lambda lines: lines[:1], "has no train line yet"),
        (lambda lines: [*lines[:3], "{oops", *lines[3:]], "line 4 is no JSON"),
        (lambda lines: [*lines[:3], "7", *lines[3:]], "line 4 is no JSON object"),
        (
            lambda lines: [*lines, '{"kind": "train", "step": 50}'],
            r"line 43 \(train\) lacks samples",
        ),
        (
            lambda lines: [line.replace('"val"', '"dev"') for line in lines],
            "has no evaluation on split 'val'",
        ),
    ],
)
def test_metrics_that_cannot_be_read(run_dir: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    (run_dir / "metrics.jsonl").write_text("\n".join(change(metrics_lines())))
    with pytest.raises(UserError, match=rf"metrics\.jsonl: {message}"):
        write_report(run_dir, None, run_dir / "report.html")
    assert not (run_dir / "report.html").exists()


def test_folders_that_are_no_run(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such run"):
        write_report(tmp_path / "nowhere", None, tmp_path / "report.html")
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: no metrics; has the run started"):
        write_report(run_dir, None, tmp_path / "report.html")


@pytest.mark.parametrize("content", ["{", "{}", "[]", "3"])
def test_examples_that_cannot_be_read(run_dir: Path, content: str) -> None:
    (run_dir / "examples.json").write_text(content)
    with pytest.raises(UserError, match=r"examples\.json: .*; run `dist-vse eval` again"):
        write_report(run_dir, None, run_dir / "report.html")
