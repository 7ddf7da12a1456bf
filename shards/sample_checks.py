"""Check a sample: its captions, and its image by its structure or by decoding it."""

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dist_vse.common.files import LFS_POINTER
from dist_vse.data.index import IMAGE_FORMATS
from dist_vse.data.sample_fields import check_fields
from dist_vse.data.vectors import EXTENSION, check_vector, is_vector

if TYPE_CHECKING:
    from PIL import Image  # not here: most images are never opened

# The extension that a tar member gets, by Pillow's name of the format: it follows the bytes, not
# the file's name, since many a PNG is called .jpg.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # several JPEGs in one file, as some phones write
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
MAX_PIXELS = 1024**3 // 4 // 3  # Pillow's own limit, from which on it suspects a bomb
_PNG_START = b"\x89PNG\r\n\x1a\n"
# PNG chunks that no decoder stumbles over, with their length where it is fixed.
_PNG_CHUNKS = dict.fromkeys((b"PLTE", b"IDAT", b"IEND", b"tEXt", b"eXIf", b"tIME", b"bKGD"))
_PNG_CHUNKS |= {b"IHDR": 13, b"pHYs": 9, b"gAMA": 4, b"sRGB": 1, b"cHRM": 32}
# Colour type to bits a channel (https://www.w3.org/TR/png-3/#11IHDR).
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_HEADER = struct.Struct(">IIBB3s")  # width, height, bits, colour type, methods
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a frame's header
_JPEG_USUAL = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive: no lossless ones
_JPEG_FACTORS = frozenset(16 * x + y for x in range(1, 5) for y in range(1, 5))  # of samples
_JPEG_TABLES = 0xDB  # for quantization
_JPEG_SEGMENT = struct.Struct(">BBH")  # 0xFF, marker, length
_JPEG_FRAME = struct.Struct(">BHHB")  # bits, height, width, components


class BadSampleError(Exception):
    """A sample cannot be used; the message is the reason."""


def check_captions(captions: Sequence[str]) -> None:
    """Raise BadSampleError unless there is a caption and every caption has text."""
    if not captions:
        raise BadSampleError("no caption")
    for number, caption in enumerate(captions, 1):
        if not caption.strip():
            raise BadSampleError(f"caption {number} of {len(captions)} is blank")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise BadSampleError(
                f"caption {number} is no valid Unicode ({error.reason})"
            ) from error


def check_optional(fields: Mapping[str, object], num_captions: int) -> None:
    """Raise BadSampleError if a field of the JSON that training reads is not as it must be."""
    try:
        check_fields(fields, num_captions)
    except ValueError as error:
        raise BadSampleError(str(error)) from error


def check_image(data: bytes | memoryview, *, decode: bool = True) -> str:
    """Return the extension that fits the image's format, once it is known to be whole.

    With `decode` every pixel is decoded. Without, a JPEG with its first and last marker and a PNG
    whose chunks have the right checksums are accepted, in a hundredth of the time. An image in
    doubt is decoded. A vector (`data.vectors`) stands in the place of an image.

    Raises BadSampleError for no bytes, an unknown format, damage, or a decompression bomb (more
    than Pillow's `MAX_IMAGE_PIXELS`, 89 million pixels).
    """
    if is_vector(data):
        try:
            check_vector(data)
        except ValueError as error:
            raise BadSampleError(str(error)) from error
        return EXTENSION
    extension = None if decode else _extension_if_whole(data)
    if extension is not None:
        return extension
    from dist_vse.data.image_file import is_wide, narrowed  # here: most images are never opened

    with checked_image(data) as image:
        image.verify()  # checksums; an image can't be used after it
    with checked_image(data) as image:
        image.load()
        if is_wide(image):
            narrowed(image)  # raises for values that training would refuse
        assert image.format is not None, "an opened image has a format"
        return EXTENSIONS[image.format]


@contextmanager
def checked_image(data: bytes | memoryview) -> "Iterator[Image.Image]":
    """Open an image for the body; raise BadSampleError for what goes wrong there or in the body."""
    from PIL import UnidentifiedImageError

    from dist_vse.data.image_file import open_image  # here: most images are never opened

    if not data:
        raise BadSampleError("the image file is empty (0 bytes)")
    try:
        with open_image(data) as image:
            yield image
    except UnidentifiedImageError as error:
        if data[: len(LFS_POINTER)] == LFS_POINTER:
            raise BadSampleError(
                "the file is a pointer of Git LFS, no image; run `git lfs pull`"
            ) from error
        known = ", ".join(IMAGE_FORMATS)
        raise BadSampleError(f"the file is no image of a known format ({known})") from error
    except Exception as error:
        # Pillow raises nearly any kind for damaged bytes; whichever it is, it is reported.
        raise BadSampleError(f"the image does not decode ({error})") from error


def _extension_if_whole(data: bytes | memoryview) -> str | None:
    """Return the extension of a JPEG or PNG whose structure is whole; None if in doubt."""
    if data[:3] == b"\xff\xd8\xff" and data[-2:] == b"\xff\xd9":
        pixels, extension = _jpeg_pixels(data), "jpg"
    elif data[: len(_PNG_START)] == _PNG_START:
        pixels, extension = _png_pixels(data), "png"
    else:
        return None
    return extension if 0 < pixels <= MAX_PIXELS else None


def _jpeg_pixels(data: bytes | memoryview) -> int:
    """Return width x height from the markers before the first scan; 0 if they make no sense.

    It is 0 too for kinds that few decoders know, such as lossless ones or those of 12 bits.
    """
    at, pixels, end, tables = 2, 0, len(data) - 9, False
    while at < end:
        start, marker, length = _JPEG_SEGMENT.unpack_from(data, at)
        if start != 0xFF:
            break
        if marker == 0xDA:  # a scan: pixels from here on
            return pixels if tables else 0
        if marker in _JPEG_FRAMES:
            bits, height, width, components = _JPEG_FRAME.unpack_from(data, at + 4)
            usual = marker in _JPEG_USUAL and bits == 8 and components in (1, 3, 4)
            if pixels or not usual or length != 8 + 3 * components:
                return 0
            if not _JPEG_FACTORS.issuperset(data[at + 11 : at + 2 + length : 3]):
                return 0
            pixels = height * width
        tables = tables or marker == _JPEG_TABLES
        at += 2 + length
    return 0


def _png_pixels(data: bytes | memoryview) -> int:
    """Return width x height if every chunk has its checksum and IEND is the last; else 0.

    It is 0 too for chunks that decoders may refuse, such as compressed text, and where the pixels'
    stream does not begin as one.
    """
    at, pixels, kind, stream = len(_PNG_START), 0, b"", False
    while at + 12 <= len(data) and kind != b"IEND":
        length, kind = int.from_bytes(data[at : at + 4], "big"), bytes(data[at + 4 : at + 8])
        end = at + 8 + length
        if _PNG_CHUNKS.get(kind, -1) not in (None, length):
            return 0
        if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return 0
        if kind == b"IHDR":
            if pixels:
                return 0
            width, height, bits, colours, methods = _PNG_HEADER.unpack_from(data, at + 8)
            if bits not in _PNG_DEPTHS.get(colours, ()) or methods != b"\0\0\0":
                return 0  # or interlaced
            pixels = height * width
        elif kind == b"PLTE" and (length % 3 or not 0 < length <= 768):
            return 0
        elif kind == b"IDAT" and not stream:  # zlib's: deflate, and a check of two bytes
            stream = length > 1 and data[at + 8] & 0xF == 8
            if not stream or int.from_bytes(data[at + 8 : at + 10], "big") % 31:
                return 0
        at = end + 4
    return pixels if stream and kind == b"IEND" and at == len(data) else 0
