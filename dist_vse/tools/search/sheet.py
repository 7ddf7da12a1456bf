"""What was found, as one page of HTML or one PNG."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from dist_vse.common.files import atomic_output
from dist_vse.tools.report.style import STYLE
from dist_vse.tools.search.found import Found
from dist_vse.tools.search.picture import draw_sheet


def write_sheet(
    path: Path, found: Sequence[Found], pictures: dict[str, str], from_images: set[str]
) -> None:
    """Write the answers to all queries; `pictures` are data URIs by key.

    Queries in `from_images` are paths of images. By one rename; raises UserError where the file
    cannot be written.
    """
    with atomic_output(path) as temporary:
        if path.suffix == ".png":
            draw_sheet(found, pictures, path.name).save(temporary, "PNG")
        else:
            temporary.write_text(_html(found, pictures, from_images), encoding="utf-8")


def _html(found: Sequence[Found], pictures: dict[str, str], from_images: set[str]) -> str:
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
