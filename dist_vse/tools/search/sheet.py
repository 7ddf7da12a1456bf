"""What was found, as one page of HTML or one PNG."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from dist_vse.common.files import atomic_output
from dist_vse.tools.report.neighbours import Neighbours, hidden_part, thumbnail
from dist_vse.tools.report.page import document
from dist_vse.tools.search.explore import SCRIPT
from dist_vse.tools.search.found import Found
from dist_vse.tools.search.picture import draw_sheet


def write_sheet(
    path: Path,
    found: Sequence[Found],
    pictures: dict[str, str],
    from_images: set[str],
    neighbours: Neighbours,
    names: dict[str, str],
) -> None:
    """Write the answers to all queries; `pictures` are data URIs by key, `names` captions.

    Queries in `from_images` are paths of images. By one rename; raises UserError where the file
    cannot be written.
    """
    with atomic_output(path) as temporary:
        if path.suffix == ".png":
            draw_sheet(found, pictures, path.name).save(temporary, "PNG")
            return

        def thumb(key: str) -> str:
            return thumbnail(key, pictures, names[key])

        body = _body(found, from_images, thumb) + hidden_part(neighbours, thumb)
        page = document("Found images", body, SCRIPT)
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # odd paths


def _body(found: Sequence[Found], from_images: set[str], thumb: Callable[[str], str]) -> str:
    parts = []
    for answers in found:
        rows = zip(answers.keys, answers.scores, answers.captions, strict=True)
        items = "".join(
            f'<li data-place="{place}" data-score="{score:.4f}" data-key="{escape(key)}" '
            f'data-caption="{escape(caption)}">{thumb(key)}{escape(caption)}<br>{score:.2f}</li>'
            for place, (key, score, caption) in enumerate(rows)
        )
        name = f"image {answers.query}" if answers.query in from_images else f"“{answers.query}”"
        parts.append(
            f'<li class="card"><h3>{escape(name)}</h3><ol class="answers found">{items}</ol></li>'
        )
    return (
        "<h1>Found images</h1>"
        '<p class="note">The best first; numbers are cosine similarities. Click an image for its '
        "nearest others.</p>"
        f'<ul class="examples">{"".join(parts)}</ul>'
    )
