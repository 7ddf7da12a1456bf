"""The page: its sections in order, in one file that needs no other."""

import datetime
import os
import platform
import statistics
from html import escape
from importlib.metadata import version
from pathlib import Path

from dist_vse import __version__
from dist_vse.index import Index
from dist_vse.report import sections
from dist_vse.report.images import open_data, thumbnails
from dist_vse.report.numbers import figure
from dist_vse.report.record import Record, read_record
from dist_vse.report.style import STYLE

_PACKAGES = ("torch", "deepspeed", "accelerate", "webdataset", "timm", "transformers")


def write_report(run_dir: Path, index_dir: Path | None, out: Path) -> Path:
    """Write the report of a run's folder to `out`, by one rename; return its path.

    Images come from the data set in `index_dir`, or the one that the run was trained on; where
    that one is gone, the page shows keys in their place and says so. Raises UserError if the
    run has no metrics yet, a file of it cannot be read, or `index_dir` is another data set.
    """
    record = read_record(run_dir)
    index = open_data(index_dir, record.config.data.index)
    images = None
    if index is not None and record.examples is not None:
        images = thumbnails(index, record.examples["split"], _keys(record))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(_page(record, index, images), encoding="utf-8")
    os.replace(temporary, out)
    return out


def _keys(record: Record) -> set[str]:
    assert record.examples is not None
    queries = record.examples["text_to_image"]
    shown = {answer["key"] for query in queries for answer in query["answers"]}
    asked = {query["key"] for query in [*queries, *record.examples["image_to_text"]]}
    return shown | asked


def _page(record: Record, index: Index | None, images: dict[str, str] | None) -> str:
    today = datetime.date.today().isoformat()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(record.name)} · dist_vse</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{sections.header(record)}
{sections.result_tables(record)}
{sections.charts(record)}
{sections.examples(record, images)}
{_details(record, index)}
<footer>Written by dist_vse {escape(__version__)} on {today}.</footer>
</main>
</body>
</html>
"""


def _details(record: Record, index: Index | None) -> str:
    parts = [sections.facts("Run", _run_facts(record))]
    if index is not None:
        parts.append(sections.facts("Data", _data_facts(index)))
    parts.append(sections.facts("Software of this report", _versions()))
    return (
        f'<h2>Details</h2><div class="facts">{"".join(parts)}</div>'
        f'<details class="card"><summary>Whole configuration</summary>'
        f"<pre>{escape(record.config_text)}</pre></details>"
    )


def _run_facts(record: Record) -> dict[str, str]:
    config, last = record.config, record.train[-1]
    rate = statistics.median(line["pairs_per_s"] for line in record.train)
    text = config.model.text
    return {
        "Loss": config.loss.name,
        "Global batch": f"{config.global_batch_size:,} pairs",
        "Chunk": f"{config.fixed_chunk_size:,} pairs",
        "Steps": f"{last['step']:,} of {config.total_steps:,}",
        "Image encoder": config.model.image.name
        + (", frozen" if config.model.image.frozen else ""),
        "Text encoder": text.kind + (", frozen" if text.frozen else ""),
        "Shared space": f"{config.model.embed_dim:,} dimensions",
        "Optimizer": f"{config.optim.name}, learning rate {config.optim.lr:g}",
        "Engine": f"ZeRO {config.engine.zero_stage}, {config.engine.precision}",
        "Throughput, median": f"{figure(rate)} pairs/s",
        "Peak memory of a rank": f"{figure(last['memory_gib'])} GiB",
        "Seed": str(config.seed),
    }


def _data_facts(index: Index) -> dict[str, str]:
    splits = {
        name: f"{split.num_samples:,} images, {split.num_captions:,} captions"
        for name, split in sorted(index.splits.items())
    }
    return {"Fingerprint": index.fingerprint(), **splits}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in _PACKAGES}
    return {"dist_vse": __version__, "Python": platform.python_version(), **packages}
