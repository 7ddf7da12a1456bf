"""Join OpenMoji, Tux Paint stamps and Open Clip Art: the largest real set from registries.

    python demo/openmoji.py OUT_DIR
    python -m demo.mixed OUT_DIR       # needs apt-get (Debian, Ubuntu); writes OUT_DIR/mixed.jsonl

OpenMoji's drawings are CC BY-SA 4.0, the stamps GPL-2, the clip art public domain; all are
fetched, none is shipped. Stamps have a sentence each, clip art a title, a description and
keywords. A hash of the name without its numbers ("evolution 01", "evolution 02") decides the
split, so that a series stays on one side; pictures equal to the byte are taken once.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from demo.openmoji import WORKERS, split_of
from dist_vse.common.errors import UserError
from dist_vse.common.files import atomic_write, sha256_of_file, write_text
from shards.pool import ordered_map

PACKAGES = ("tuxpaint-stamps-default", "openclipart-svg")
_DC = "{http://purl.org/dc/elements/1.1/}"
_LI = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
_NOTHING = re.compile(r"(?:untitled|unknown|new|drawing|layer|image|svg|openclipart|\W|\d)*", re.I)
_MOST_BYTES = 1_000_000  # of an SVG; a few take minutes to draw
Picture = tuple[Path, tuple[str, ...]]


def fetch(folder: Path) -> Path:
    """Unpack the Debian packages into `folder`, unless they are there; return it.

    Raises UserError where apt-get cannot get them.
    """
    done = folder / "done"
    if done.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for package in PACKAGES:
            subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
        for archive in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg", "-x", archive.name, "."], cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{', '.join(PACKAGES)}: apt-get cannot get them ({error})") from error
    done.touch()
    return folder


def stamps(folder: Path) -> Iterator[Picture]:
    """Yield Tux Paint's stamps with their English sentence."""
    for text in sorted(folder.rglob("tuxpaint/stamps/**/*.txt")):
        for extension in (".png", ".svg"):
            picture = text.with_suffix(extension)
            if picture.is_file():
                lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
                if lines and lines[0].strip():
                    yield picture, (lines[0].strip(),)
                break


def clip_art(folder: Path) -> Iterator[Picture]:
    """Yield Open Clip Art's drawings with what their metadata says."""
    for path in sorted(folder.rglob("openclipart/svg/**/*.svg")):
        if path.is_file() and path.stat().st_size <= _MOST_BYTES:
            captions = captions_of(path.read_bytes())
            if captions:
                yield path, captions


def captions_of(svg: bytes) -> tuple[str, ...]:
    """Return the title, the description and the keywords of an SVG, each if it says something."""
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError:
        return ()
    found: dict[str, str] = {}
    title = root.find(f".//{_DC}title")
    description = root.find(f".//{_DC}description")
    keywords = [item.text or "" for item in root.findall(f".//{_DC}subject//{_LI}")]
    texts = [node.text or "" if node is not None else "" for node in (title, description)]
    for text in (*texts, ", ".join(word.strip() for word in keywords if word.strip())):
        caption = " ".join(re.sub(r"[_\s]+", " ", text).split())
        if 3 <= len(caption) <= 200 and not _NOTHING.fullmatch(caption):
            found.setdefault(caption.lower(), caption)
    return tuple(found.values())


def draw(picture: Picture, folder: Path, size: int) -> tuple[str, str, tuple[str, ...]] | None:
    """Draw over white; return the PNG's name, its digest and the captions, or None if broken."""
    from PIL import Image
    from resvg_py import svg_to_bytes

    path, captions = picture
    name = hashlib.sha256(str(path.name).encode() + path.read_bytes()).hexdigest()[:16]
    out = folder / f"{name}.png"
    if not out.is_file():
        try:
            data = path.read_bytes()
            if path.suffix == ".svg":
                data = svg_to_bytes(svg_path=str(path), width=size, skip_system_fonts=True)
            with Image.open(io.BytesIO(data)) as image:
                image.thumbnail((size, size))
                rgba = image.convert("RGBA")
            white = Image.new("RGBA", (size, size), "white")
            white.alpha_composite(rgba, ((size - rgba.width) // 2, (size - rgba.height) // 2))
            with atomic_write(out) as temporary:
                white.convert("RGB").save(temporary, "PNG")
        except (ValueError, OSError, Image.DecompressionBombError):
            return None
    return out.name, sha256_of_file(out), captions


def write_mixed(out: Path, size: int) -> Path:
    """Write `mixed.jsonl`: OpenMoji's lines, then the stamps and the clip art."""
    source = out / "pairs.jsonl"
    if not source.is_file():
        raise UserError(f"{source}: is missing; run python demo/openmoji.py {out}")
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    debian = fetch(out / "debian")
    folder = out / f"mixed-{size}"
    folder.mkdir(exist_ok=True)
    pictures = [*stamps(debian), *clip_art(debian)]
    seen: set[str] = set()
    for drawn in ordered_map(partial(draw, folder=folder, size=size), pictures, WORKERS):
        if drawn is None or drawn[1] in seen:
            continue
        name, digest, captions = drawn
        seen.add(digest)
        concept = " ".join(re.sub(r"[\W\d_]+", " ", captions[0].lower()).split())
        lines.append(
            {
                "image": f"{folder.name}/{name}",
                "captions": captions,
                "split": split_of(concept),
                "key": name.removesuffix(".png"),
            }
        )
    path = out / "mixed.jsonl"
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for split in ("train", "val", "test"):
        print(f"{split}: {sum(line['split'] == split for line in lines):,} images")
    return path


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Join OpenMoji, stamps and clip art.")
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--size", type=int, default=224, help="side in pixels [%(default)s]")
    args = parser.parse_args()
    try:
        print(write_mixed(args.out, args.size))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
