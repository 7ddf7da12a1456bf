"""Is a sample whole? Its captions are read, its image is decoded to the last pixel."""

import io
import warnings
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError

# The formats that are read, with the extension that a tar member gets: it follows the bytes,
# not the file's name, since many a PNG is called .jpg. Nothing that runs code (EPS) is here.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # several JPEGs in one file, as some phones write
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
_FORMATS = tuple(name for name in EXTENSIONS if name != "MPO")  # Pillow opens MPO as JPEG


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


def check_image(data: bytes) -> str:
    """Decode the image wholly; return the extension that fits its format.

    Raises BadSampleError for no bytes, an unknown format, damage, or a decompression bomb (more
    than Pillow's `MAX_IMAGE_PIXELS`, 89 million pixels).
    """
    if not data:
        raise BadSampleError("the image file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                image.verify()  # checksums; an image can't be used after it
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                image.load()
                image_format = image.format
    except UnidentifiedImageError as error:
        known = ", ".join(_FORMATS)
        raise BadSampleError(f"the file is no image of a known format ({known})") from error
    except Exception as error:
        # Pillow raises nearly any kind for damaged bytes; whichever it is, it is reported.
        raise BadSampleError(f"the image does not decode ({error})") from error
    assert image_format is not None, "an opened image has a format"
    return EXTENSIONS[image_format]
