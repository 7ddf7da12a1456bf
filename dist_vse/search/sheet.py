"""What was found, as one page of HTML or one PNG."""

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from dist_vse.report.style import STYLE

if TYPE_CHECKING:
    from dist_vse.search.run import Found

CELL, GAP, TITLE = 160, 12, 30  # pixels of a PNG sheet
COLUMNS = 10


def write_sheet(
    path: Path, found: "Sequence[Found]", pictures: dict[str, str], from_images: set[str]
) -> None:
    """Write the answers to all queries; `pictures` are data URIs by key.

    Queries in `from_images` are paths of images. By one rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if path.suffix == ".png":
        _png(found, pictures).save(temporary, "PNG")
    else:
        temporary.write_text(_html(found, pictures, from_images), encoding="utf-8")
    os.replace(temporary, path)


def _html(found: "Sequence[Found]", pictures: dict[str, str], from_images: set[str]) -> str:
    parts = []
    for answers in found:
        rows = zip(answers.keys, answers.scores, answers.captions, strict=True)
        items = "".join(
            f'<li><img class="thumb" src="{pictures[key]}" alt="{escape(caption)}">'
            f"{escape(caption)}<br>{score:.2f}</li>"
            for key, score, caption in rows
        )
        name = f"image {answers.query}" if answers.query in from_images else f"“{answers.query}”"
        parts.append(
            f'<li class="card"><h3>{escape(name)}</h3><ol class="answers found">{items}</ol></li>'
        )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Found images · dist_vse</title>
<style>{STYLE}
.answers.found {{ grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); margin-top: 12px; }}
</style>
</head>
<body>
<main>
<h1>Found images</h1>
<p class="note">The best first; numbers are cosine similarities.</p>
<ul class="examples">{"".join(parts)}</ul>
</main>
</body>
</html>
"""


def _png(found: "Sequence[Found]", pictures: dict[str, str]) -> Image.Image:
    columns = min(COLUMNS, max(len(answers.keys) for answers in found))
    rows = [-(-len(answers.keys) // columns) for answers in found]
    height = sum(TITLE + count * (CELL + GAP) for count in rows) + GAP
    sheet = Image.new("RGB", (GAP + columns * (CELL + GAP), height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    top = GAP
    for answers, count in zip(found, rows, strict=True):
        pen.text((GAP, top), answers.query, "black", font)
        for place, key in enumerate(answers.keys):
            data = base64.b64decode(pictures[key].split(",", 1)[1])
            with Image.open(io.BytesIO(data)) as image:
                cell = image.convert("RGB").resize((CELL, CELL))
            row, column = divmod(place, columns)
            sheet.paste(cell, (GAP + column * (CELL + GAP), top + TITLE + row * (CELL + GAP)))
        top += TITLE + count * (CELL + GAP)
    return sheet
