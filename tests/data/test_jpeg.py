"""JPEGs whose headers are read without Pillow, and decoded no larger than needed."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_vse.data.jpeg import COLOURED, decode_at, plain_size, scale_for


def jpeg(mode: str = "RGB", size: tuple[int, int] = (50, 30), **options: Any) -> bytes:
    """Encode a ramp from the left to the right."""
    ramp = np.tile(np.linspace(0, 255, size[0], dtype=np.uint8), (size[1], 1))
    buffer = io.BytesIO()
    Image.fromarray(ramp).convert(mode).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation
    return jpeg(exif=exif)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def test_reads_the_size_of_plain_files() -> None:
    assert plain_size(jpeg()) == (50, 30)
    assert plain_size(jpeg("L")) == (50, 30)
    assert plain_size(jpeg(progressive=True)) == (50, 30)
    assert plain_size(jpeg() + b"\xff\xe1 after the pixels") == (50, 30)


@pytest.mark.parametrize(
    "data",
    [jpeg("CMYK"), turned(), png(), b"", b"\xff\xd8\xff", jpeg()[:40]],
    ids=["cmyk", "turned", "png", "empty", "mark", "cut"],
)
def test_leaves_all_others_to_pillow(data: bytes) -> None:
    assert plain_size(data) is None


def test_leaves_grey_ones_to_pillow_where_only_colours_are_asked_for() -> None:
    assert plain_size(jpeg("L"), COLOURED) is None
    assert plain_size(jpeg(), COLOURED) == (50, 30)


def test_a_bomb_is_no_plain_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50 * 30)
    assert plain_size(jpeg()) == (50, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50 * 30 - 1)
    assert plain_size(jpeg()) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a user has lifted Pillow's bound
    assert plain_size(jpeg()) == (50, 30)


@pytest.mark.parametrize(
    ("reduction", "scale"),
    [(0.5, 1), (1, 1), (1.99, 1), (2, 2), (3.9, 2), (4, 4), (7.9, 4), (8, 8), (100, 8)],
)
def test_the_scale_keeps_every_pixel_that_is_needed(reduction: float, scale: int) -> None:
    assert scale_for(reduction) == scale


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_decodes_at_a_fraction_that_is_rounded_up(scale: int) -> None:
    pixels = decode_at(jpeg(), (50, 30), scale)
    assert pixels is not None
    assert pixels.shape == (-(-30 // scale), -(-50 // scale), 3)
    middles = (np.arange(50 // scale) + 0.5) * scale - 0.5  # in pixels of the whole image
    expected = middles * 255 / 49
    assert np.abs(pixels[0, : len(expected), 0] - expected).max() < 6


def test_decodes_to_grey() -> None:
    pixels = decode_at(jpeg("L"), (50, 30), 2, colours="GRAY")
    assert pixels is not None and pixels.shape == (15, 25, 1)


def test_leaves_a_damaged_file_to_pillow() -> None:
    assert decode_at(jpeg()[:300], (50, 30), 1) is None
