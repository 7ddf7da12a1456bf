"""A sample that would fail in training is found while sharding."""

import pytest
from PIL import Image

from dist_vse.shards.sample_checks import BadSampleError, check_captions, check_image
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
