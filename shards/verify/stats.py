"""What is in a data set: lengths, sizes, what occurs twice, and what some samples look like."""

import io
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.reading import parse_json
from dist_vse.data.index import Index, Shard
from dist_vse.data.vectors import is_vector, vector_place
from dist_vse.shards.captions import named_languages
from dist_vse.shards.pool import ordered_map
from dist_vse.shards.sample_checks import BadSampleError, checked_image
from dist_vse.shards.verify.read import Stored, local_tar, read_stored

THUMB, TEXT_LINES, COLUMNS = 160, 3, 8  # of a contact sheet: pixels, lines, thumbs
LINE_CHARS, LINE_PIXELS = 26, 15
GREY = (160, 160, 160)


@dataclass
class Stats:
    """Counts of one split; a histogram maps a value to how often it occurs."""

    words: Counter[int] = field(default_factory=Counter)  # in a caption
    captions: Counter[int] = field(default_factory=Counter)  # of an image
    sides: Counter[int] = field(default_factory=Counter)  # longer side, pixels; a vector's numbers
    kilobytes: Counter[int] = field(default_factory=Counter)  # of an image file
    formats: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)  # of captions
    image_ids: Counter[int] = field(default_factory=Counter)

    def add(self, other: "Stats") -> None:
        """Count another shard in."""
        for name, counter in vars(other).items():
            getattr(self, name).update(counter)

    @property
    def repeated(self) -> int:
        """Images that are equal to an earlier one of the split."""
        return sum(self.image_ids.values()) - len(self.image_ids)


def dataset_stats(
    index: Index, *, workers: int, advance: Callable[[int], None]
) -> dict[str, Stats]:
    """Count every split; image sizes come from the files' heads, no image is decoded.

    Raises UserError if a sample is broken (`verify` names all of those).
    """
    shards = [(name, shard) for name, split in index.splits.items() for shard in split.shards]
    stats = {name: Stats() for name in index.splits}
    counted = ordered_map(partial(shard_stats, index=index), [s for _, s in shards], workers)
    for (name, _), of_shard in zip(shards, counted, strict=True):
        stats[name].add(of_shard)
        advance(1)
    return stats


def shard_stats(shard: Shard, index: Index) -> Stats:
    """Count one shard."""
    stats = Stats()
    with local_tar(index, shard) as tar:
        for row, stored in enumerate(read_stored(index, shard, tar)):
            try:
                _count(stats, stored)
            except (BadSampleError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{shard.path}: sample in row {row} is broken ({first_line(error)}); "
                    f"`dist-vse shard verify {index.root}` names all of them"
                ) from error
    return stats


def _count(stats: Stats, stored: Stored) -> None:
    captions = stored.caption_list()
    stats.captions[len(captions)] += 1
    stats.words.update(len(caption.split()) for caption in captions)
    stats.languages.update(
        named_languages(parse_json(stored.meta, dict).get("languages"), captions)
    )
    stats.kilobytes[len(stored.image) // 1000] += 1
    stats.image_ids[stored.image_id] += 1
    if is_vector(stored.image):
        stats.sides[vector_place(stored.image)[1]] += 1
        stats.formats["vector"] += 1
        return
    with checked_image(stored.image) as image:
        stats.sides[max(image.size)] += 1
        stats.formats[str(image.format)] += 1


def shared_images(stats: dict[str, Stats]) -> list[tuple[str, str, int]]:
    """Return the pairs of splits that hold equal images, and how many: training sees the test."""
    names = sorted(stats)
    pairs = [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    counts = [len(stats[a].image_ids.keys() & stats[b].image_ids.keys()) for a, b in pairs]
    return [(a, b, count) for (a, b), count in zip(pairs, counts, strict=True) if count]


def write_contact_sheet(index: Index, path: Path, *, count: int = 48) -> int:
    """Draw `count` samples, evenly spread over all splits, into one picture; return how many.

    Each shows its image, its split and its first caption.
    """
    cell = THUMB + TEXT_LINES * LINE_PIXELS + 8
    tiles = list(_spread(index, count))
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (THUMB + 8), rows * cell), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (split, stored) in enumerate(tiles):
        left, top = number % COLUMNS * (THUMB + 8) + 4, number // COLUMNS * cell + 4
        thumb = _thumb(stored.image)
        place = (left + (THUMB - thumb.width) // 2, top + (THUMB - thumb.height) // 2)
        sheet.paste(thumb, place, thumb)
        text = f"{split}: {next(iter(stored.caption_list()), '(no caption)')}"
        lines = textwrap.wrap(text, LINE_CHARS, max_lines=TEXT_LINES, placeholder=" ...")
        pen.multiline_text((left, top + THUMB + 2), "\n".join(lines), "black", font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    return len(tiles)


def _thumb(data: bytes) -> Image.Image:
    """Return a small picture (RGBA) of an image: grey, and marked so, of one that is unusable."""
    try:
        with checked_image(data) as image:
            thumb = image.convert("RGBA")
            thumb.thumbnail((THUMB, THUMB))
            return thumb
    except BadSampleError:
        tile = Image.new("RGBA", (THUMB, THUMB), GREY)
        middle, font = (THUMB // 2, THUMB // 2), ImageFont.load_default(16)
        ImageDraw.Draw(tile).text(middle, "unusable", "black", font, anchor="mm")
        return tile


def _spread(index: Index, count: int) -> Iterator[tuple[str, Stored]]:
    """Yield samples at even distances over the whole data set."""
    shards = [(name, shard) for name, split in index.splits.items() for shard in split.shards]
    total = sum(shard.num_samples for _, shard in shards)
    wanted = {i * total // min(count, total) for i in range(min(count, total))}
    first = 0
    for name, shard in shards:
        numbers = range(first, first + shard.num_samples)
        first += shard.num_samples
        if wanted.isdisjoint(numbers):
            continue
        with local_tar(index, shard) as tar:
            for number, stored in zip(numbers, read_stored(index, shard, tar), strict=True):
                if number in wanted:
                    yield name, stored
