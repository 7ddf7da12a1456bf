"""The page: its sections in order, in one file that needs no other."""

import datetime
import statistics
from html import escape
from pathlib import Path

from dist_vse.common.files import atomic_output, check_output
from dist_vse.common.version import __version__
from dist_vse.data.index import Index
from dist_vse.evaluation.examples import shown_keys
from dist_vse.tools.report import sections
from dist_vse.tools.report.batch import batch_section
from dist_vse.tools.report.explore import SCRIPT
from dist_vse.tools.report.images import names_commands, open_data, thumbnails
from dist_vse.tools.report.neighbours import all_keys
from dist_vse.tools.report.numbers import figure
from dist_vse.tools.report.record import Record, read_record
from dist_vse.tools.report.results import result_tables
from dist_vse.tools.report.sets import set_tables
from dist_vse.tools.report.style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What a browser lets the page do: run its own script and style, and load nothing."""


def write_report(run_dir: Path, index_dir: Path | None, out: Path) -> Path:
    """Write the report of a run's folder to `out`, by one rename; return its path.

    Images come from the data set in `index_dir`, or the one that the run was trained on; where
    that one is gone, or its shards are commands, the page shows keys in their place and says so.
    Raises UserError if the run has no metrics yet, a file of it cannot be read, `index_dir` is
    another data set, or `out` cannot be written.
    """
    record = read_record(run_dir)
    check_output(out)
    return write_page(render(record, index_dir), out)


def render(record: Record, index_dir: Path | None) -> str:
    """Return the page of a run; raises UserError as `write_report` does."""
    index = open_data(index_dir, record.config.data.index)
    images = None
    if index is not None and record.examples is not None and not names_commands(index):
        keys = shown_keys(record.examples) | all_keys(record.examples.get("neighbours", {}))
        images = thumbnails(index, record.examples["split"], keys)
    return document(record.name, "\n".join(_parts(record, index, images)))


def _parts(record: Record, index: Index | None, images: dict[str, str] | None) -> list[str]:
    return [
        sections.header(record),
        result_tables(record),
        set_tables(record),
        sections.charts(record),
        batch_section(record),
        sections.examples(record, images),
        _details(record, index),
    ]


def write_page(page: str, out: Path) -> Path:
    """Write a page to `out` by one rename; return its path.

    Raises UserError where it cannot be written.
    """
    with atomic_output(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def document(title: str, body: str, script: str = SCRIPT) -> str:
    """Return a whole page that needs no other file."""
    today = datetime.date.today().isoformat()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · dist_vse</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
<footer>Written by dist_vse {escape(__version__)} on {today}.</footer>
</main>
<script>{script}</script>
</body>
</html>
"""


def _details(record: Record, index: Index | None) -> str:
    parts = [sections.facts("Run", _run_facts(record))]
    if data := _data_facts(record, index):
        parts.append(sections.facts("Data", data))
    made = record.environment
    if made is not None:
        machine = {name.capitalize(): str(value) for name, value in made["machine"].items()}
        parts.append(sections.facts("Software of the run", made["versions"]))
        parts.append(sections.facts("Machine of the run", machine))
    return (
        f'<h2>Details</h2><div class="facts">{"".join(parts)}</div>'
        f'<details class="card"><summary>Whole configuration</summary>'
        f"<pre>{escape(record.config_text)}</pre></details>"
    )


def _run_facts(record: Record) -> dict[str, str]:
    config, last = record.config, record.metrics.train.last
    rate = statistics.median(line["pairs_per_s"] for line in record.metrics.train.by_step())
    text = config.model.text
    pretrained = config.model.pretrained
    start = f"of {Path(pretrained).name}" if pretrained is not None else None
    before = config.model.from_run
    return {
        **({"Started from": before} if before is not None else {}),
        "Loss": config.loss.name,
        "Global batch": f"{config.global_batch_size:,} pairs",
        "Chunk": f"{config.fixed_chunk_size:,} pairs",
        "Steps": f"{last['step']:,} of {config.total_steps:,}",
        "Image encoder": (start or config.model.image.name)
        + (", frozen" if config.model.image.all_frozen else ""),
        "Text encoder": (start or text.kind) + (", frozen" if text.all_frozen else ""),
        "Shared space": f"{config.model.embed_dim:,} dimensions",
        "Optimizer": f"{config.optim.name}, learning rate {config.optim.lr:g}",
        "Engine": f"{config.engine.title}, {config.engine.precision}",
        "Throughput, median": f"{figure(rate)} pairs/s",
        "Peak memory of a rank": f"{figure(last['memory_gib'])} GiB",
        "Seed": str(config.seed),
    }


def _data_facts(record: Record, index: Index | None) -> dict[str, str]:
    """Return the fingerprints that training noted, and what is at hand now."""
    facts = {"Fingerprint in training": record.data} if record.data else {}
    if record.environment is not None:  # of other sets too: data.mix
        noted = record.environment["data"].items()
        facts |= {place: found for place, found in noted if found != record.data}
    if index is None:
        return facts
    now = index.fingerprint()
    if now != record.data:
        facts["Fingerprint now"] = f"{now}: not what was trained on" if record.data else now
    return facts | {
        name: f"{split.num_samples:,} images, {split.num_captions:,} captions"
        for name, split in sorted(index.splits.items())
    }
