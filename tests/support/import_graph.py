"""Draw which package of dist_vse imports which: `make graph`.

The packages stand on a diagonal, the lowest layer at the bottom left. From each one a line runs
left: what it imports. Into each one an arrow runs down: what imports it. A dot joins the two.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tests.support.imports import module_graph
from tests.test_layers import LAYERS

ABOUT = {
    "common": "errors, log, files, signals, memory, timing",
    "distributed": "process group, collectives, gloo, watchdog",
    "losses": "the losses over the global batch, in tiles",
    "config": "the settings of a run, checked",
    "data": "shards to batches, in one global order",
    "shards": "dist-vse shard: makes data sets",
    "models": "encoders, heads, tokenizers, pretrained weights",
    "engine": "DeepSpeed's ZeRO, or plain PyTorch",
    "runs": "a run's folder: checkpoints, metrics, lease",
    "training": "the train step, and what it takes",
    "evaluation": "retrieval over all ranks",
    "tools": "report, verify, export, search, plan, bench",
    "train": "the loop",
    "launch": "dist-vse submit: Slurm, local jobs",
    "cli": "the command dist-vse",
}

COLUMN, ROW = 60, 46  # from one package to the next
BOX, BOX_HEIGHT = 98, 28
LEFT, TOP, WIDTH = 28, 28, 1150
# Dots have three sizes, so that the picture changes when the structure does, not with every import.
DOTS = ((1, 3.0, "1 module"), (2, 4.5, "2 to 9 modules"), (10, 6.5, "10 or more"))
STYLE = """
  .page { fill: #f8fafc }
  .box { fill: #eaf1fb; stroke: #3b6fb6 }
  .line { stroke: #9fb4cf; stroke-width: 1.4; fill: none }
  .dot, .head { fill: #24528f }
  text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1c2733 }
  .name { font-size: 13.5px; font-weight: 600; text-anchor: middle }
  .about { font-size: 12.5px; fill: #57677a }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0f1620 }
    .box { fill: #1b2b42; stroke: #6d9de0 }
    .line { stroke: #4d6382 }
    .dot, .head { fill: #9cc1f5 }
    text { fill: #e4ebf3 }
    .about { fill: #9fb0c3 }
  }
"""
LEGEND = (
    "Left of a package: what it imports.",
    "Above a package: what imports it.",
    "Nothing joins below: no import runs up.",
)


def package_imports() -> Counter[tuple[str, str]]:
    """Count, for (importer, imported), the modules of one package that import from the other."""
    pairs = set()
    for module, others in module_graph().items():
        for other in others:
            names = module.split("."), other.split(".")
            if all(name[0] == "dist_vse" and len(name) > 1 for name in names):
                pairs.add((module, names[0][1], names[1][1]))
    return Counter((importer, imported) for _, importer, imported in pairs if importer != imported)


def draw(layers: Sequence[str], imports: Counter[tuple[str, str]]) -> str:
    """Return the picture as SVG, readable on light and dark pages."""
    height = 2 * TOP + ROW * (len(layers) - 1) + BOX_HEIGHT
    x = {name: LEFT + BOX / 2 + COLUMN * i for i, name in enumerate(layers)}
    y = {name: height - TOP - BOX_HEIGHT / 2 - ROW * i for i, name in enumerate(layers)}
    lines, dots, boxes = [], [], []
    for name in layers:
        below = [other for other in layers if (name, other) in imports]
        above = [other for other in layers if (other, name) in imports]
        top = y[name] - BOX_HEIGHT / 2
        if below:
            ends = f'x1="{x[name] - BOX / 2:g}" x2="{min(x[other] for other in below):g}"'
            lines.append(f'<line class="line" {ends} y1="{y[name]:g}" y2="{y[name]:g}"/>')
        if above:
            ends = f'y1="{min(y[other] for other in above):g}" y2="{top - 6:g}"'
            lines.append(f'<line class="line" x1="{x[name]:g}" x2="{x[name]:g}" {ends}/>')
            head = f"M{x[name]:g} {top - 1:g}l-4.5 -8h9z"
            dots.append(f'<path class="head" d="{head}"/>')
        dots += [_dot(x[other], y[name], imports[name, other]) for other in below]
        boxes += [
            f'<rect class="box" x="{x[name] - BOX / 2:g}" y="{top:g}" width="{BOX}" '
            f'height="{BOX_HEIGHT}" rx="6"/>',
            f'<text class="name" x="{x[name]:g}" y="{y[name] + 4.5:g}">{name}</text>',
            f'<text class="about" x="{x[name] + BOX / 2 + 10:g}" y="{y[name] + 4.5:g}">'
            f"{escape(ABOUT[name])}</text>",
        ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>Which package of dist_vse imports which</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
            *(*lines, *dots, *boxes, *_legend(WIDTH - 310, height - TOP - 118)),
            "</svg>\n",
        ]
    )


def _dot(x: float, y: float, count: int) -> str:
    radius = max(radius for least, radius, _ in DOTS if count >= least)
    return f'<circle class="dot" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>'


def _legend(x: float, y: float) -> list[str]:
    """Return the words that say how to read the picture, for the empty corner."""
    text = '<text class="about" x="{:g}" y="{:g}">{}</text>'
    marks = [text.format(x, y + 20 * i, line) for i, line in enumerate(LEGEND)]
    for i, (least, _, words) in enumerate(DOTS):
        height = y + 20 * (len(LEGEND) + i) + 8
        marks += [_dot(x + 7, height - 4, least), text.format(x + 22, height, words)]
    return marks


def main() -> None:
    """Write the picture to the path given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.parse_args().path.write_text(draw(LAYERS, package_imports()), encoding="utf-8")


if __name__ == "__main__":
    main()
