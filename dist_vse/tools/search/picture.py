"""What was found, as one picture: each image with its place, its score and its caption."""

import base64
import io
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

from dist_vse.common.log import logger
from dist_vse.data.index import IMAGE_FORMATS
from dist_vse.tools.search.found import Found

CELL, GAP, MARGIN = 160, 16, 24  # pixels
COLUMNS, MIN_COLUMNS = 10, 3
LINE, TITLE_LINE = 19, 27  # pixels from line to line
CAPTION_LINES = 4
INK, SOFT = "#1c2024", "#5a626b"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_sheet(found: Sequence[Found], pictures: dict[str, str], name: str) -> Image.Image:
    """Draw the answers to all queries, row by row; `pictures` are data URIs by key.

    Warns where the font has no glyph for a text of the sheet, which goes by `name`.
    """
    _warn_of_gaps((text for f in found for text in (f.query, *f.captions)), name)
    longest = max(len(answers.keys) for answers in found)
    columns = min(COLUMNS, max(MIN_COLUMNS, longest))
    width = columns * (CELL + GAP) - GAP
    blocks = [_block(answers, pictures, columns, width) for answers in found]
    height = sum(block.height + MARGIN for block in blocks) + MARGIN
    sheet = Image.new("RGB", (width + 2 * MARGIN, height), "white")
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN, top))
        top += block.height + MARGIN
    return sheet


def wrap(text: str, font: Font, width: int, max_lines: int | None = None) -> list[str]:
    """Break a text into lines of at most `width` pixels, the last of `max_lines` ending in dots."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:  # a word may be longer than a line, and some scripts have no spaces
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if max_lines is None or len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last.rstrip()}…"]


def _block(answers: Found, pictures: dict[str, str], columns: int, width: int) -> Image.Image:
    """Draw one query and its answers."""
    title, small = ImageFont.load_default(20), ImageFont.load_default(14)
    head = wrap(answers.query, title, width)
    captions = [wrap(text, small, CELL, CAPTION_LINES) for text in answers.captions]
    starts = range(0, len(captions), columns)
    lines = [1 + max(map(len, captions[start : start + columns])) for start in starts]
    tops = [len(head) * TITLE_LINE + 8]
    for count in lines:
        tops.append(tops[-1] + CELL + 6 + count * LINE + GAP)
    block = Image.new("RGB", (width, tops[-1]), "white")
    pen = ImageDraw.Draw(block)
    for number, line in enumerate(head):
        pen.text((0, number * TITLE_LINE), line, INK, title)
    for place, (key, score) in enumerate(zip(answers.keys, answers.scores, strict=True)):
        row, column = divmod(place, columns)
        left, top = column * (CELL + GAP), tops[row]
        block.paste(_cell(pictures[key]), (left, top))
        texts = [f"{place + 1}.  {score:.3f}", *captions[place]]
        for number, text in enumerate(texts):
            ink = SOFT if number == 0 else INK
            pen.text((left, top + CELL + 6 + number * LINE), text, ink, small)
    return block


def _cell(uri: str) -> Image.Image:
    data = base64.b64decode(uri.split(",", 1)[1])
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        cell: Image.Image = image.convert("RGB").resize((CELL, CELL))
    return cell


def _warn_of_gaps(texts: Iterable[str], name: str) -> None:
    """Warn once if the font draws a letter as it draws one that no font has."""
    font = ImageFont.load_default(14)
    nothing = bytes(font.getmask("\U0010ffff"))
    letters = sorted({letter for text in texts for letter in text if not letter.isspace()})
    gaps = [letter for letter in letters if bytes(font.getmask(letter)) == nothing]
    if gaps:
        shown = "".join(gaps[:8])
        logger.warning("%s: the font has no %s (%d in all); use .html", name, shown, len(gaps))
