"""Broken or huge metadata never costs an image: what sharding keeps, training decodes."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from dist_vse.data.decode import BadSampleError as BadTrainingSampleError
from dist_vse.data.decode import Transform, decode_image
from dist_vse.data.image_file import open_image, orientation, turned
from dist_vse.shards.build.recode import Recode, recode_image
from dist_vse.shards.sample_checks import BadSampleError, check_image
from tests.support.datasets import draw, encode

SIDE = 24
PHOTO = draw(3, size=SIDE)
JPEG, PNG, WEBP = (encode(PHOTO, kind) for kind in ("JPEG", "PNG", "WEBP"))
WHOLE = {"JPEG": JPEG, "PNG": PNG, "WEBP": WEBP}


def _with_chunk(kind: bytes, content: bytes) -> bytes:
    """Put a chunk behind the PNG's header."""
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return PNG[:33] + struct.pack(">I", len(content)) + kind + content + crc + PNG[33:]


def _with_segment(marker: int, content: bytes) -> bytes:
    """Put a segment behind the JPEG's start."""
    return JPEG[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + JPEG[2:]


def _with_webp_exif(content: bytes) -> bytes:
    return encode(PHOTO, "WEBP", exif=content)


BROKEN = {
    "png": _with_chunk(b"eXIf", b"Exif-what"),
    "png-density": _with_chunk(b"pHYs", b""),
    "jpeg-profile": _with_segment(0xE2, b"ICC_PROFILE\0"),
    "png-profile": _with_chunk(
        b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9\nxy")
    ),
    "webp": _with_webp_exif(b"Exif\0\0junkjunk"),
    "jpeg": _with_segment(0xE1, b"Exif\0\0junkjunk"),
    "jpeg-cut": _with_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
}
LARGE = {
    "profile": _with_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000))),
    "text": _with_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000))),
    "unicode": _with_chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(2_000_000))),
}


@pytest.mark.parametrize("name", [*BROKEN, *LARGE])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_image_with_odd_metadata_is_used_as_one_without(name: str, scaled: bool) -> None:
    data = (BROKEN | LARGE)[name]
    plain = WHOLE["JPEG" if "jpeg" in name else "WEBP" if name == "webp" else "PNG"]
    transform = Transform(SIDE, scaled=scaled)
    assert (decode_image(data, transform) == decode_image(plain, transform)).all()
    for decode in (False, True):
        assert check_image(data, decode=decode) == check_image(plain)
    shrunk, _ = recode_image(data, Recode(max_side=8, format="png"))
    assert shrunk == recode_image(plain, Recode(max_side=8, format="png"))[0]


@pytest.mark.parametrize("value", [0, 9, 65535, -1, "6", b"\6", (6, 6), 2.5, float("nan"), None])
def test_a_value_that_is_no_orientation_is_upright(value: object) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    image = PHOTO.copy()
    image.getexif = lambda: exif  # type: ignore[method-assign]
    assert orientation(image) == 1


@pytest.mark.parametrize("stored", range(1, 9))
def test_the_orientation_is_the_one_that_pillow_uses(stored: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = stored
    image = open_image(encode(PHOTO.crop((0, 0, 16, 24)), "PNG", exif=exif))
    ours = turned(image, orientation(image))
    assert (np.asarray(ours) == np.asarray(ImageOps.exif_transpose(image))).all()


def test_broken_pixels_of_a_png_are_not_taken_for_broken_metadata() -> None:
    with pytest.raises(OSError):
        orientation(open_image(PNG[:-60]))


@settings(max_examples=150, deadline=None)
@given(
    place=st.sampled_from(["exif", "xmp", "icc", "photoshop", "mpf", "comment", "eXIf", "iCCP",
                           "tEXt", "zTXt", "iTXt", "tIME", "pHYs", "gAMA", "webp"]),
    content=st.binary(max_size=80),
    sound=st.booleans(),
)  # fmt: skip
def test_what_sharding_keeps_training_decodes(place: str, content: bytes, sound: bool) -> None:
    heads = {
        "exif": (0xE1, b"Exif\0\0"), "xmp": (0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
        "icc": (0xE2, b"ICC_PROFILE\0"), "photoshop": (0xED, b"Photoshop 3.0\0"),
        "mpf": (0xE2, b"MPF\0"), "comment": (0xFE, b""),
    }  # fmt: skip
    start = (
        b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0" if sound else b""
    )  # one EXIF entry: orientation
    if place in heads:
        marker, head = heads[place]
        data = _with_segment(marker, head + start + content)
    elif place == "webp":
        data = _with_webp_exif(b"Exif\0\0" + start + content)
    else:
        data = _with_chunk(place.encode(), start + content)
    try:
        check_image(data, decode=False)
    except BadSampleError:
        return
    check_image(data, decode=True)
    for scaled in (False, True):
        assert decode_image(data, Transform(SIDE, scaled=scaled)).shape == (3, SIDE, SIDE)
    with io.BytesIO(recode_image(data, Recode(max_side=8))[0]) as file, Image.open(file) as image:
        image.load()


def _tiff(values: "np.ndarray[Any, Any]") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    return buffer.getvalue()


WIDE = np.linspace(0, 255, 16 * 16).reshape(16, 16)


@pytest.mark.parametrize(
    "values",
    [
        (WIDE / 255).astype("f4"),
        WIDE.astype("f4"),
        (WIDE * 257).astype("f4"),
        WIDE.astype("i4"),
        (WIDE * 257).astype("i4"),
        (WIDE * 257).astype("u2"),
    ],
)
def test_wide_modes_are_scaled_by_their_range(values: "np.ndarray[Any, Any]") -> None:
    data = _tiff(values)
    assert check_image(data) == "tif"
    assert abs(decode_image(data, Transform(16))[0] - WIDE).max() <= 1.01
    png, _ = recode_image(data, Recode(format="png"))
    assert abs(decode_image(png, Transform(16))[0] - WIDE).max() <= 1.01


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ((WIDE - 100).astype("f4"), r"mode F \(32-bit float\) with values from -100 to 155"),
        ((WIDE * 1e6).astype("i4"), r"mode I \(32-bit integers\) with values from 0 to 2\.55e\+08"),
        (np.full((8, 8), np.nan, "f4"), r"mode F .* from nan to nan"),
    ],
)
def test_wide_values_of_no_known_range_are_bad_everywhere(
    values: "np.ndarray[Any, Any]", mode: str
) -> None:
    data = _tiff(values)
    with pytest.raises(BadSampleError, match=mode):
        check_image(data, decode=False)
    with pytest.raises(BadSampleError, match=mode):
        recode_image(data, Recode(format="png"))
    with pytest.raises(BadTrainingSampleError, match=mode):
        decode_image(data, Transform(16))
