"""Images of every kind become the same square of 8-bit RGB."""

import io
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional

from dist_vse.data.decode import (
    BadSampleError,
    Transform,
    center_box,
    decode_image,
    jitter_colors,
    random_box,
)
from dist_vse.data.index import IMAGE_FORMATS
from dist_vse.shards.sample_checks import EXTENSIONS
from tests.support.datasets import draw, encode

RED = (220, 40, 40)


def flat(mode: str, colour: Any, *, size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.new(mode, size, colour)


def decode(image: Image.Image, format: str = "PNG", size: int = 8, **options: Any) -> Any:
    return decode_image(encode(image, format, **options), Transform(size)).astype(int)


def indexed(transparency: int | None = None) -> bytes:
    image = flat("P", 0)
    image.putpalette([220, 40, 40, 0, 0, 0])
    return encode(image) if transparency is None else encode(image, transparency=transparency)


KINDS: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "RGB": (encode(flat("RGB", RED)), RED),
    "RGB jpeg": (encode(flat("RGB", RED), "JPEG", quality=95), RED),
    "RGB webp": (encode(flat("RGB", RED), "WEBP", lossless=True), RED),
    "gray": (encode(flat("L", 77)), (77, 77, 77)),
    "gray jpeg": (encode(flat("L", 77), "JPEG"), (77, 77, 77)),
    "one bit": (encode(flat("1", 1)), (255, 255, 255)),
    "palette": (indexed(), RED),
    "palette, red is transparent": (indexed(transparency=0), (255, 255, 255)),
    "transparent": (encode(flat("RGBA", (*RED, 0))), (255, 255, 255)),
    "half transparent": (encode(flat("RGBA", (200, 0, 100, 128))), (227, 127, 177)),
    "opaque": (encode(flat("RGBA", (*RED, 255))), RED),
    "gray with alpha": (encode(flat("LA", (0, 0))), (255, 255, 255)),
    "RGB with a transparent colour": (encode(flat("RGB", RED), transparency=RED), (255,) * 3),
    "16 bits": (encode(flat("I;16", 20_000)), (77, 77, 77)),
    "16 bits, big-endian tiff": (encode(flat("I;16B", 20_000), "TIFF"), (77, 77, 77)),
    "32 bits": (encode(flat("I", 20_000), "TIFF"), (77, 77, 77)),
    "float": (encode(flat("F", 77.0), "TIFF"), (77, 77, 77)),
    "CMYK jpeg": (encode(flat("CMYK", (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "CMYK tiff": (encode(flat("CMYK", (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
    "LAB": (encode(flat("LAB", (255, 128, 128)), "TIFF"), (255, 255, 255)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_becomes_rgb(kind: str) -> None:
    data, colour = KINDS[kind]
    for scaled in (False, True):
        image = decode_image(data, Transform(8, scaled=scaled))
        assert image.shape == (3, 8, 8)
        assert image.dtype == np.uint8
        assert np.abs(image.astype(int) - np.array(colour).reshape(3, 1, 1)).max() <= 2


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [flat("RGB", RED), flat("RGB", (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    assert np.abs(decode_image(data, Transform(8))[:, 4, 4].astype(int) - RED).max() <= 2


def quarters() -> NDArray[np.uint8]:
    """Four colours, so that every turn and mirror image looks different: uint8 (16, 16, 3)."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8], pixels[:8, 8:], pixels[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = quarters()
    # What a camera stores so that a viewer that obeys the tag shows `upright` (EXIF 2.3, table 6).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(Image.fromarray(np.ascontiguousarray(stored)), size=16, exif=exif)
    np.testing.assert_array_equal(image, upright.transpose(2, 0, 1))


def test_middle_crop_is_plain_bicubic() -> None:
    image = draw(5, size=90).resize((130, 90))
    expected = image.crop((20, 0, 110, 90)).resize((32, 32), Image.Resampling.BICUBIC)
    actual = decode_image(encode(image), Transform(32))
    np.testing.assert_array_equal(actual, np.asarray(expected).transpose(2, 0, 1))


def photograph(width: int, height: int) -> Image.Image:
    """Smooth and sharp parts, as a photograph has: a drawing under coloured noise of all scales."""
    rng = np.random.default_rng(0)
    pixels = np.asarray(draw(5, size=48).resize((width, height), Image.Resampling.BICUBIC), float)
    for side in (4, 16, 64, 256):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        layer = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float)
        pixels = pixels + (layer - 128) * 0.12
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [32, 96, 150, 224, 400])
@pytest.mark.parametrize("side", ["center", 1.0, 0.5, 0.2])
def test_scaled_jpeg_decoding_is_close_to_the_antialiased_full_one(
    size: int, side: str | float
) -> None:
    """Within 2 % mean absolute difference; scales of 1/8 to 1, and more pixels than there are."""
    data = encode(photograph(640, 480), "JPEG", quality=92)
    area = side if isinstance(side, float) else 1.0
    plain = Transform(size, random_crop=side != "center", min_crop_area=area)
    for seed in range(3):
        fast, full = (
            decode_image(data, transform, np.random.default_rng(seed)).astype(float)
            for transform in (replace(plain, scaled=True), plain)
        )
        assert np.abs(fast - full).mean() < 0.02 * 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_turns_upright_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(320, 200), "JPEG", quality=95, exif=exif)
    fast, full = (
        decode_image(data, Transform(50, scaled=scaled)).astype(float) for scaled in (True, False)
    )
    assert np.abs(fast - full).mean() < 0.02 * 255


def test_scaled_decoding_leaves_damaged_files_to_pillow() -> None:
    """What libjpeg only warns of stays usable; what is cut does not."""
    whole = encode(photograph(320, 240), "JPEG")
    odd = whole[:-2] + bytes(40) + whole[-2:]  # bytes before the end marker that mean nothing
    transform = Transform(64, scaled=True)
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(odd)
    mended, plain = (decode_image(data, transform).astype(float) for data in (odd, whole))
    assert np.abs(mended - plain).mean() < 5
    with pytest.raises(BadSampleError, match="truncated"):
        decode_image(whole[: len(whole) // 2], transform)


def test_color_jitter_is_the_three_of_torchvision() -> None:
    pixels = np.random.default_rng(0).integers(90, 160, (8, 8, 3), np.uint8)  # nothing is clipped
    strength = 0.3
    factors = np.random.default_rng(7).uniform(1 - strength, 1 + strength, 3)
    expected = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).double() / 255
    for change, factor in zip(
        (
            functional.adjust_brightness,
            functional.adjust_contrast,
            functional.adjust_saturation,
        ),
        factors,
        strict=True,
    ):
        expected = change(expected, factor)
    jitter_colors(pixels, strength, np.random.default_rng(7))
    np.testing.assert_allclose(pixels.transpose(2, 0, 1), expected.numpy() * 255, atol=1.5)


def test_random_boxes_fit_and_spread() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(400, 300, 0.3, rng) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    area = (right - left) * (bottom - top) / (400 * 300)
    aspect = (right - left) / (bottom - top)
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 400 and bottom.max() <= 300
    assert 0.3 - 1e-9 <= area.min() < 0.31 and 0.9 < area.max() <= 1
    assert 0.75 - 1e-9 <= aspect.min() < 0.77 and 1.3 < aspect.max() <= 4 / 3 + 1e-9


def test_a_box_that_cannot_fit_becomes_the_middle() -> None:
    assert random_box(1000, 10, 1.0, np.random.default_rng(0)) == center_box(1000, 10)
    assert center_box(1000, 10) == (495, 0, 505, 10)


def test_flip_mirrors_half_of_the_images() -> None:
    data = encode(Image.fromarray(quarters()))
    plain = decode_image(data, Transform(16))
    rng = np.random.default_rng(0)
    images = [decode_image(data, Transform(16, flip=True), rng) for _ in range(200)]
    mirrored = [image for image in images if (image == plain[:, :, ::-1]).all()]
    assert len(mirrored) + sum((image == plain).all() for image in images) == 200
    assert 70 < len(mirrored) < 130


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_tiny_and_thin_images(size: tuple[int, int]) -> None:
    data = encode(flat("RGB", RED, size=size))
    jpeg = encode(flat("RGB", RED, size=size), "JPEG", quality=100, subsampling=0)
    random = Transform(8, random_crop=True, min_crop_area=0.3, scaled=True)
    for image in (
        decode_image(data, Transform(8)),
        decode_image(data, random, np.random.default_rng(0)),
        decode_image(jpeg, random, np.random.default_rng(0)),
        decode_image(jpeg, Transform(8, scaled=True)),
    ):
        assert np.abs(image[:, 3, 3].astype(int) - RED).max() <= 2


def bomb(width: int, height: int) -> bytes:
    """A PNG header that claims a size; no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def bomb_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header claims another size."""
    data = bytearray(encode(draw(1, size=64), "JPEG"))
    frame = data.index(b"\xff\xc0")  # marker, length (2), precision (1), height (2), width (2)
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BROKEN = {
    "empty": (b"", "no bytes"),
    "text": (b"not an image", "not an image file"),
    "code": (encode(flat("RGB", RED), "EPS"), r"not an image file \(JPEG, PNG, "),
    "cut": (encode(draw(1, size=64), "JPEG")[:900], "truncated"),
    "cut png": (encode(draw(1, size=64))[:120], "OSError|SyntaxError|truncated"),
    "bomb": (bomb(30_000, 30_000), "DecompressionBombError"),
    "bomb jpeg": (bomb_jpeg(30_000, 30_000), "DecompressionBombError"),
    "small bomb": (bomb(10_000, 10_000), "DecompressionBombWarning"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_bad_samples(kind: str) -> None:
    data, reason = BROKEN[kind]
    for scaled in (False, True):
        with pytest.raises(BadSampleError, match=reason):
            decode_image(data, Transform(8, scaled=scaled))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_whole_jpeg_of_too_many_pixels_is_bad(
    monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    data = encode(draw(1, size=64), "JPEG")
    decode_image(data, Transform(8, scaled=scaled))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(BadSampleError, match="DecompressionBomb"):
        decode_image(data, Transform(8, scaled=scaled))


def test_shards_hold_what_the_stream_reads() -> None:
    assert set(IMAGE_FORMATS) == set(EXTENSIONS) - {"MPO"}
