"""A run as training leaves it, of six images, and the pages that are made of it."""

import html.parser
import json
import re
from pathlib import Path

import torch

from dist_vse.config import DataConfig, TrainConfig, dump_config
from dist_vse.evaluation.evaluate import Embedded, Evaluation, score
from dist_vse.evaluation.examples import save_examples
from dist_vse.tools.report import write_report
from tests.support.datasets import write_dataset

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


def report(run_dir: Path) -> Page:
    """Write the run's report; return the page."""
    return Page(write_report(run_dir, None, run_dir / "report.html"))


def cells(source: str) -> dict[str, list[str]]:
    """Return the cells of each table row, by the row's label."""
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', source)
    return {label: re.findall(r"<td.*?>(.*?)</td>", row) for label, row in rows}


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


def write_run(folder: Path) -> Path:
    """Write a run of 40 steps, and the data set that it names, into the folder."""
    data = folder / "data"
    write_dataset(data, {"val": [4, 2], "test": 3})
    path = folder / "my <run>"
    path.mkdir()
    config = TrainConfig(output_dir=str(path), total_steps=40, data=DataConfig(index=str(data)))
    (path / "config.yaml").write_text(dump_config(config))
    (path / "metrics.jsonl").write_text("\n".join(metrics_lines()) + "\n")
    how = {"split": "val", "num_queries": 6, "num_extremes": 0, "k": 3}
    save_examples(evaluation(1.5), path / "examples.json", **how)  # type: ignore[arg-type]
    return path


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
