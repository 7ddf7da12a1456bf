"""Tiny real data sets for the tests: drawn shapes whose captions say what is drawn.

`write_dataset(tmp_path, {"train": 64, "val": [5, 3]})` makes shards of learnable pairs such as
"a red square on blue"; `write_shards` takes samples that a test made itself.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dist_vse.data.index import Index, Shard, Split, image_id, offsets_name, write_index

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 50),
    "purple": (140, 50, 170),
    "orange": (250, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("square", "circle", "triangle", "cross")
COMBINATIONS = len(COLOURS) * (len(COLOURS) - 1) * len(SHAPES)  # 224 different captions
STRIDE = 83  # coprime to COMBINATIONS: neighbours differ in colour and shape


@dataclass(frozen=True)
class Sample:
    """What goes into a shard; `meta` replaces the usual JSON by any bytes."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    extension: str = "png"
    meta: bytes | None = None


def describe(number: int) -> tuple[str, str, str]:
    """Return the shape, its colour and its ground; different for 224 numbers in a row."""
    combination = number * STRIDE % COMBINATIONS
    pair, shape = divmod(combination, len(SHAPES))
    first, second = divmod(pair, len(COLOURS) - 1)
    names = list(COLOURS)
    ground = [name for name in names if name != names[first]][second]
    return SHAPES[shape], names[first], ground


def draw(number: int, *, size: int = 32, seed: int = 0) -> Image.Image:
    """Draw what `describe(number)` says; no two (number, seed) give the same pixels."""
    shape, colour, ground = describe(number)
    rng = np.random.default_rng((number, seed))
    image = Image.new("RGB", (size, size), COLOURS[ground])
    pen = ImageDraw.Draw(image)
    left, top = rng.integers(size // 8, size // 3, 2).tolist()
    side = int(rng.integers(size // 3, size // 2))
    box = (left, top, left + side, top + side)
    if shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    elif shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "triangle":
        corners = [(left, top + side), (left + side, top + side), (left + side // 2, top)]
        pen.polygon(corners, fill=COLOURS[colour])
    else:
        pen.line((left, top, left + side, top + side), fill=COLOURS[colour], width=size // 8)
        pen.line((left, top + side, left + side, top), fill=COLOURS[colour], width=size // 8)
    for x in range(4):  # the number and the seed as a colour in a corner nobody sees
        code = (number >> (8 * x)) & 255, (seed >> (8 * x)) & 255, x
        image.putpixel((size - 1 - x, size - 1), code)
    return image


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Return the image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def make_sample(
    number: int, *, size: int = 32, captions: int = 2, seed: int = 0, prefix: str = "sample"
) -> Sample:
    """Return one drawn sample with `captions` captions, all of them true."""
    shape, colour, ground = describe(number)
    wordings = (
        f"a {colour} {shape} on {ground}",
        f"{colour} {shape} over a {ground} ground",
        f"there is a {shape} in {colour} on {ground}",
        f"on {ground} a {colour} {shape}",
        f"a {shape} that is {colour} and a {ground} ground",
    )
    chosen = tuple(wordings[c % 5] + " again" * (c // 5) for c in range(captions))
    return Sample(f"{prefix}{number:06d}", encode(draw(number, size=size, seed=seed)), chosen)


def write_dataset(
    root: Path,
    splits: Mapping[str, int | Sequence[int]],
    *,
    shard_size: int = 16,
    size: int = 32,
    captions: int = 2,
) -> Index:
    """Write shards of drawn samples: a number of samples a split, or its shards' sizes.

    Sample i of every split shows the same combination, drawn differently; up to 224 samples no
    caption of a split stands for two images.
    """
    shards: dict[str, list[list[Sample]]] = {}
    for seed, (name, sizes) in enumerate(splits.items()):
        if isinstance(sizes, int):
            full, rest = divmod(sizes, shard_size)
            sizes = [shard_size] * full + ([rest] if rest else [])
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        shards[name] = [
            [
                make_sample(number, size=size, captions=captions, seed=seed, prefix=name)
                for number in range(start, start + count)
            ]
            for start, count in zip(starts, sizes, strict=True)
        ]
    return write_shards(root, shards)


def write_shards(root: Path, splits: Mapping[str, Sequence[Sequence[Sample]]]) -> Index:
    """Write samples, split by split and shard by shard, with side files and the index."""
    root.mkdir(parents=True, exist_ok=True)
    index = Index(
        root,
        {
            name: Split(
                [
                    _write_shard(root, f"{name}-{number:05d}.tar", name, samples)
                    for number, samples in enumerate(shards)
                ],
                sum(len(sample.captions) for samples in shards for sample in samples),
            )
            for name, shards in splits.items()
        },
    )
    write_index(index)
    return index


def _write_shard(root: Path, name: str, split: str, samples: Sequence[Sample]) -> Shard:
    path = root / name
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            meta = json.dumps({"key": sample.key, "captions": sample.captions, "split": split})
            parts = {
                sample.extension: sample.image,
                "json": meta.encode() if sample.meta is None else sample.meta,
                "txt": "".join(sample.captions[:1]).encode(),
            }
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    rows = [
        (image.offset_data, image.size, meta.offset_data, meta.size, image_id(sample.image))
        for sample, image, meta in zip(samples, members[::3], members[1::3], strict=True)
    ]
    np.save(root / offsets_name(name), np.array(rows, np.int64).reshape(len(rows), 5))
    content = path.read_bytes()
    return Shard(name, len(samples), len(content), hashlib.sha256(content).hexdigest())
