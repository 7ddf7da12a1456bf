"""JPEG decoding by libjpeg-turbo: read the size from the headers, decode at a reduced scale."""

import math

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

SCALES = (8, 4, 2)  # whole fractions only: libjpeg-turbo has no fast code for 5/8 and the like
COLOURED = ("YCbCr", "RGB")

Pixels = NDArray[np.uint8]


def plain_size(
    data: bytes, colours: tuple[str, ...] = (*COLOURED, "Gray")
) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG of these colours without EXIF that is not too large.

    Returns None for every other file. Reads only the headers, much faster than Pillow opens a file.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    if data.find(b"\xff\xe1", 0, data.find(b"\xff\xda")) >= 0:  # EXIF or XMP before the pixels
        return None
    try:
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    too_large = width * height > (Image.MAX_IMAGE_PIXELS or math.inf)
    return None if too_large or stored not in colours else (width, height)


def scale_for(reduction: float) -> int:
    """Return n of the smallest scale 1/n that still holds every pixel of a `reduction`-fold one."""
    return next((scale for scale in SCALES if reduction >= scale), 1)


def decode_at(
    data: bytes, size: tuple[int, int], scale: int, *, colours: str = "RGB"
) -> Pixels | None:
    """Decode at 1/scale; `size` is (width, height) of the whole image, `colours` RGB or GRAY.

    Returns uint8 (h, w, 3) or (h, w, 1); None for a damaged file, which Pillow may still read.
    """
    width, height = size
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data, colours, min_width=-(-width // scale), min_height=-(-height // scale)
        )
    except ValueError:
        return None
    return pixels
