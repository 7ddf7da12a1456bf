"""Open image files with Pillow, and turn them upright, whatever their metadata holds."""

import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from dist_vse.data.index import IMAGE_FORMATS

_PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_METADATA = frozenset((*range(0xE2, 0xEE), 0xEF, 0xFE))  # not JFIF, EXIF or XMP, and Adobe

# Pillow refuses a PNG with a colour profile or text above 1 MiB, though its pixels are whole. All
# text of a file together stays limited, to 64 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(data: bytes | memoryview) -> Image.Image:
    """Open an image of one of the `IMAGE_FORMATS`; a decompression bomb is an error.

    A JPEG or PNG that Pillow can't open is tried again without its metadata. Raises what Pillow
    raises, which for damaged bytes can be nearly anything.
    """
    try:
        return _open(data)
    except Exception:
        plain = _without_metadata(bytes(data))
        if plain is None:
            raise
        return _open(plain)


def _open(data: bytes | memoryview) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)


def _without_metadata(data: bytes) -> bytes | None:
    """Return a JPEG or PNG without its metadata, except EXIF; None if there is none to remove."""
    if data.startswith(b"\xff\xd8\xff"):
        parts = _jpeg_parts(data)
    elif data.startswith(_PNG_START):
        parts = _png_parts(data)
    else:
        return None
    plain = b"".join(part for part, needed in parts if needed)
    return plain if len(plain) < len(data) else None


def _jpeg_parts(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield the segments before the first scan, then the rest; each with whether it is needed."""
    yield data[:2], True
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at:end], data[at + 1] not in _JPEG_METADATA
        at = end
    yield data[at:], True


def _png_parts(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield the start and all chunks, each with whether it is needed."""
    yield _PNG_START, True
    at = len(_PNG_START)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        yield data[at:end], kind[:1].isupper() or kind in (b"tRNS", b"eXIf")
        at = end


def orientation(image: Image.Image) -> int:
    """Return how an image is stored, 1 (upright) to 8 (EXIF 2.3, table 6).

    Metadata that is broken, or that names no such number, counts as upright: it never raises. What
    is wrong with the pixels of a PNG is raised, because its EXIF may follow them.
    """
    if image.format == "PNG":
        image.load()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about broken EXIF
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return next((number for number in _METHODS if value == number), 1)
    except MemoryError:
        raise
    except Exception:  # broken EXIF can raise nearly anything
        return 1


def turned(image: Image.Image, stored: int) -> Image.Image:
    """Return the image upright; `stored` is its `orientation`."""
    return image.transpose(_METHODS[stored]) if stored in _METHODS else image


def is_wide(image: Image.Image) -> bool:
    """Return whether the pixels have more than 8 bits: 16 or 32, integer or float."""
    return image.mode == "F" or image.mode.startswith("I")


def narrowed(image: Image.Image) -> Image.Image:
    """Return an image `is_wide` of as 8 bits grey (L).

    16 bits are divided by 257. Of 32 bits the largest value shows which range they have: 1 (float
    only), 255 or 65535. Raises ValueError, naming the mode, for negative, larger or no numbers.
    """
    values = np.asarray(image)
    if image.mode.startswith("I;16") or image.format == "PNG":  # older Pillow: I for 16 bits too
        return Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        scale = 255.0
    elif low >= 0 and high <= 65535:
        scale = 1.0 if high <= 255 else 1 / 257
    else:
        kind = "float" if image.mode == "F" else "integers"
        raise ValueError(
            f"mode {image.mode} (32-bit {kind}) with values from {low:g} to {high:g}; scale them "
            "to 0 to 1, 255 or 65535"
        )
    return Image.fromarray(np.rint(values * scale).astype(np.uint8))
