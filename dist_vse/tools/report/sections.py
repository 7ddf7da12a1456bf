"""The report's sections, each a function from the record to HTML."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from dist_vse.config.evaluation import VAL_LOSS
from dist_vse.losses.registry import loss_label
from dist_vse.tools.report.chart import Series, line_figure
from dist_vse.tools.report.lines import extremes, points
from dist_vse.tools.report.neighbours import hidden_part, thumbnail
from dist_vse.tools.report.numbers import ordinal
from dist_vse.tools.report.record import Record
from dist_vse.tools.report.results import cell
from dist_vse.tools.report.sets import RECALL_CURVES, set_charts


@dataclass(frozen=True)
class _Chart:
    title: str
    unit: str
    lines: dict[str, str]  # label -> field, which lines of training or of evaluations have
    from_zero: bool = True


_CHARTS = (
    _Chart(
        "Loss",
        "of a global batch",
        {"training": "loss", "validation": VAL_LOSS},
        from_zero=False,
    ),
    _Chart(
        "Recall",
        "% of queries",
        RECALL_CURVES,
    ),
    _Chart("Throughput", "pairs a second, all ranks", {"pairs/s": "pairs_per_s"}),
    _Chart("Memory", "peak of a rank, GiB", {"memory": "memory_gib"}),
    _Chart(
        "Similarity",
        "mean cosine in the batch",
        {"right pairs": "positive_similarity", "hardest wrong ones": "hardest_similarity"},
        from_zero=False,
    ),
    _Chart(
        "Active negatives",
        "share of rows, by the margin",
        {"active": "active_share"},
    ),
    _Chart(
        "Alignment and uniformity",
        "lower is better for both",
        {"alignment": "alignment", "uniformity": "uniformity"},
        from_zero=False,
    ),
    _Chart("Temperature", "t of the loss", {"temperature": "temperature"}),
    _Chart("Learning rate", "", {"learning rate": "lr"}),
)


def header(record: Record) -> str:
    """Name the run, say in a sentence what it was, and show four figures."""
    config, result, last = record.config, record.results[0], record.metrics.train.last
    metrics = result.columns.get("trained") or result.columns["untrained"]

    def before(field: str) -> str:
        others = ((n, c) for n, c in result.columns.items() if c is not metrics)
        return ", ".join(
            f"{record.column_name(name)} {cell(field, column[field])}" for name, column in others
        )

    figures = [
        ("rsum, at most 600", cell("rsum", metrics["rsum"]), before("rsum")),
        ("Image to text R@1", cell("i2t_r1", metrics["i2t_r1"]) + " %", before("i2t_r1")),
        ("Text to image R@1", cell("t2i_r1", metrics["t2i_r1"]) + " %", before("t2i_r1")),
        ("Pairs seen", f"{last['samples_seen']:,}", f"in {last['step']:,} steps"),
    ]
    cards = "".join(
        f'<div class="card"><dt>{name}</dt><dd>{value}<span class="unit">{unit}</span></dd></div>'
        for name, value, unit in figures
    )
    loss = loss_label(config.loss.name)
    return (
        f"<h1>{escape(record.name)}</h1>"
        f'<p class="lead">Trained with {escape(loss)} over global batches of '
        f"{config.global_batch_size:,} pairs: at every step each image is compared with all "
        f"{config.global_batch_size:,} captions of its batch. Results are on "
        f"{metrics['num_images']:,} images and {metrics['num_texts']:,} captions of the split "
        f"“{escape(result.split)}”, at {escape(result.checkpoint)}.</p>"
        f'<dl class="figures">{cards}</dl>'
    )


def charts(record: Record) -> str:
    """Draw each chart whose numbers the metrics hold."""
    drawn = []
    evals = record.metrics.evals.by_step()
    lines = [*record.metrics.train.by_step(), *evals]
    for chart in _CHARTS:
        series = [
            Series(label, f"s{number}", found, extremes(lines, field))
            for number, (label, field) in enumerate(chart.lines.items(), 1)
            if (found := points(lines, "step", field))
        ]
        if series:
            drawn.append(
                line_figure(
                    chart.title,
                    series,
                    unit=chart.unit,
                    from_zero=chart.from_zero,
                    x_label="steps",
                )
            )
    drawn[2:2] = [set_charts(item, evals) for item in record.config.eval_sets]
    bad = record.metrics.left_out
    note = f'<p class="note">Damaged lines of the metrics are left out: {escape(bad)}.</p>'
    return f'<h2>Training</h2>{note if bad else ""}<div class="charts">{"".join(drawn)}</div>'


def examples(record: Record, images: dict[str, str] | None) -> str:
    """Show queries with their answers; `images` maps keys to data URIs, None without data."""
    found = record.examples
    if found is None:
        return ""
    split = escape(found["split"])
    missing = (
        '<p class="note">The data set is not at hand, so keys stand for the images.</p>'
        if images is None
        else ""
    )

    def thumb(key: str) -> str:
        return thumbnail(key, images)

    def of_texts(name: str) -> str:
        return "".join(_text_query(query, thumb) for query in found.get(name, ()))

    def of_images(name: str) -> str:
        return "".join(_image_query(query, thumb) for query in found.get(name, ()))

    return (
        "<h2>Captions and the images found for them</h2>"
        f'<p class="note">Queries were drawn at random from the split “{split}”, not picked. '
        "The right image has a green frame and a check mark; where it is not among the first, it "
        "stands last, in a dashed frame, with its rank. Numbers are cosine similarities.</p>"
        f'{missing}<ul class="examples">{of_texts("text_to_image")}</ul>'
        "<h2>Images and the captions found for them</h2>"
        f'{missing}<ul class="examples pairs">{of_images("image_to_text")}</ul>'
        + _extremes(
            "Found at once", "Drawn among the queries whose rank is 1.", of_texts, of_images, "best"
        )
        + _extremes("Found last", "The queries of the largest ranks.", of_texts, of_images, "worst")
        + hidden_part(found.get("neighbours", {}), thumb)
    )


def _extremes(
    title: str,
    note: str,
    of_texts: Callable[[str], str],
    of_images: Callable[[str], str],
    which: str,
) -> str:
    texts, images = of_texts(f"text_to_image_{which}"), of_images(f"image_to_text_{which}")
    if not texts and not images:
        return ""
    return (
        f'<h2>{title}</h2><p class="note">{note}</p><ul class="examples">{texts}</ul>'
        f'<ul class="examples pairs">{images}</ul>'
    )


def _text_query(query: dict[str, Any], thumb: Callable[[str], str]) -> str:
    answers = [
        f'<li class="right">{thumb(answer["key"])}<span class="check" aria-hidden="true">✓</span>'
        f'<span class="hidden">right, </span>{answer["score"]:.2f}</li>'
        if answer["right"]
        else f"<li>{thumb(answer['key'])}{answer['score']:.2f}</li>"
        for answer in query["answers"]
    ]
    if not any(answer["right"] for answer in query["answers"]):
        answers.append(f'<li class="missed">{thumb(query["key"])}{ordinal(query["rank"])}</li>')
    return (
        f'<li class="card query" data-rank="{query["rank"]}">'
        f"<div><q>{escape(query['caption'])}</q>{_rank(query)}</div>"
        f'<ol class="answers">{"".join(answers)}</ol></li>'
    )


def _image_query(query: dict[str, Any], thumb: Callable[[str], str]) -> str:
    answers = "".join(
        f"<li{' class=right' if answer['right'] else ''}><span>{escape(answer['caption'])}</span>"
        f'<span class="score">{answer["score"]:.2f}</span></li>'
        for answer in query["answers"]
    )
    return (
        f'<li class="card" data-rank="{query["rank"]}">{thumb(query["key"])}'
        f'<ol class="texts">{answers}</ol>{_rank(query)}</li>'
    )


def _rank(query: dict[str, Any]) -> str:
    first = " first" if query["rank"] == 1 else ""
    return f'<span class="rank{first}">found {ordinal(query["rank"])}</span>'


def facts(title: str, pairs: dict[str, str]) -> str:
    """List names and values."""
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs.items()
    )
    return f'<dl class="card"><h3>{escape(title)}</h3>{items}</dl>'
