"""The table of `demo.results`: means over seeds, deviations, and intervals over the test images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Draws = NDArray[np.float64]


def table(results: Sequence[dict[str, Any]], losses: Sequence[str], batches: Sequence[int]) -> str:
    """Write rsum as Markdown: mean ± deviation over seeds [95 % interval over images].

    A column's best is bold, and so is what is not worse with 95 % confidence: the interval of the
    difference, over the same draws of test images, reaches 0.
    """
    cells: dict[tuple[str, int], str] = {}
    for batch in batches:
        column = {
            loss: found
            for loss in losses
            if (found := [r for r in results if r["loss"] == loss and r["batch"] == batch])
        }
        drawn = {loss: _draws(found) for loss, found in column.items()}
        means = {loss: float(np.mean(_rsums(found))) for loss, found in column.items()}
        best = max(means, key=means.__getitem__, default="")
        for loss, found in column.items():
            low, high = np.quantile(drawn[loss], [0.025, 0.975])
            spread = np.std(_rsums(found), ddof=1) if len(found) > 1 else 0.0
            behind = np.quantile(drawn[best] - drawn[loss], 0.025) > 0
            text = f"{means[loss]:.1f}" if behind else f"**{means[loss]:.1f}**"
            cells[loss, batch] = f"{text} ± {spread:.1f} [{low:.0f}, {high:.0f}]"
    lines = ["| loss | " + " | ".join(f"batch {batch:,}" for batch in batches) + " |"]
    lines.append("| --- |" + " ---: |" * len(batches))
    for loss in losses:
        row = " | ".join(cells.get((loss, batch), "") for batch in batches)
        lines.append(f"| {loss} | {row} |")
    return "\n".join(lines)


def _rsums(found: Sequence[dict[str, Any]]) -> list[float]:
    return [result["test"]["metrics"]["rsum"] for result in found]


def _draws(found: Sequence[dict[str, Any]]) -> Draws:
    """Return the mean rsum of the seeds for each draw of test images, alike for all runs."""
    rows = [result["test"]["of_images"] for result in found]
    image_hits, text_hits, captions = (
        np.mean([row[name] for row in rows], axis=0)
        for name in ("image_hits", "text_hits", "captions")
    )
    n = len(captions)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)  # (draws, n)
    draws: Draws = 100 * (weights @ image_hits / n + weights @ text_hits / (weights @ captions))
    return draws
