"""A sample that would fail in training is found while sharding."""

import struct
import zlib

import pytest
from PIL import Image

from dist_vse.shards.sample_checks import (
    BadSampleError,
    _extension_if_whole,
    check_captions,
    check_image,
)
from tests.support.datasets import draw, encode


@pytest.mark.parametrize(
    ("format", "extension"),
    [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"),
     ("TIFF", "tif"), ("MPO", "jpg")],
)  # fmt: skip
def test_a_whole_image_gives_its_extension(format: str, extension: str) -> None:
    options = {"save_all": True, "append_images": [draw(2)]} if format == "MPO" else {}
    assert check_image(encode(draw(1), format, **options)) == extension


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_bad(format: str) -> None:
    data = encode(draw(1, size=64), format)
    with pytest.raises(BadSampleError):
        check_image(data[: len(data) // 2])


def test_a_flipped_bit_in_a_png_is_bad() -> None:
    data = bytearray(encode(draw(1)))
    data[len(data) // 2] ^= 1
    with pytest.raises(BadSampleError, match="does not decode"):
        check_image(bytes(data))


def test_a_wrong_checksum_is_bad() -> None:
    data = bytearray(encode(draw(1)))
    data[data.index(b"IEND") - 5] ^= 1  # the last byte of the pixels' checksum
    with pytest.raises(BadSampleError, match="does not decode"):
        check_image(bytes(data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"<html>not found</html>", "no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "no image of a known format"),
    ],
)
def test_what_is_no_image_is_bad(data: bytes, message: str) -> None:
    with pytest.raises(BadSampleError, match=message):
        check_image(data)


def test_a_decompression_bomb_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    check_image(encode(Image.new("RGB", (30, 30))))
    with pytest.raises(BadSampleError, match="decompression bomb"):
        check_image(encode(Image.new("RGB", (40, 40))))


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ((), "no caption"),
        (("fine", " \n"), "caption 2 of 2 is blank"),
        (("half \ud83d",), "caption 1 is no valid Unicode"),
    ],
)
def test_captions_must_have_text(captions: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadSampleError, match=message):
        check_captions(captions)
    check_captions(["fine", "苹果"])


def _patched(at: int, value: int) -> bytes:
    """Return a JPEG with a byte of its frame's header changed."""
    data = bytearray(encode(draw(1), "JPEG"))
    data[data.index(b"\xff\xc0") + at] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("at", "value"),
    [(1, 0xC3), (1, 0xC9), (1, 0xCB), (4, 12), (9, 2), (11, 0), (11, 0x55)],
    ids=["lossless", "arithmetic", "both", "12 bits", "2 components", "no factors", "5 x 5"],
)
def test_a_jpeg_of_an_unusual_kind_is_decoded_to_see(at: int, value: int) -> None:
    """Its structure is whole, but training could not decode it."""
    data = _patched(at, value)
    assert _extension_if_whole(data) is None
    if value != 0xC9:  # some decoders know it; these bytes are none
        with pytest.raises(BadSampleError):
            check_image(data, decode=False)


def _png(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    parts = [(b"IHDR", struct.pack(">II", 8, 8) + header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


PIXELS = (b"IDAT", zlib.compress(bytes(8 * 25)))
RGB = b"\x08\x02\0\0\0"


@pytest.mark.parametrize(
    ("header", "chunks"),
    [
        (b"\x03\x02\0\0\0", [PIXELS]),
        (b"\x08\x07\0\0\0", [PIXELS]),
        (b"\x10\x03\0\0\0", [(b"PLTE", bytes(6)), PIXELS]),
        (b"\x08\x02\0\x01\0", [PIXELS]),
        (RGB, []),
        (RGB, [(b"IDAT", b"")]),
        (RGB, [(b"IDAT", b"junk")]),
        (b"\x08\x03\0\0\0", [(b"PLTE", bytes(3000)), PIXELS]),
    ],
)
def test_a_png_with_right_checksums_and_wrong_content_is_bad(
    header: bytes, chunks: list[tuple[bytes, bytes]]
) -> None:
    assert check_image(_png(RGB, PIXELS), decode=False) == "png"
    with pytest.raises(BadSampleError):
        check_image(_png(header, *chunks), decode=False)
