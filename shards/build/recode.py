"""Shrink or convert images; those that already fit keep their bytes."""

import io
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from dist_vse.data.image_file import is_wide, narrowed, orientation, turned
from dist_vse.data.jpeg import COLOURED, Pixels, decode_at, plain_size, scale_for
from dist_vse.shards.sample_checks import EXTENSIONS, checked_image

FORMATS = ("jpeg", "png", "webp")
REDUCING_GAP = 3.0  # Pillow: from 3 on nearly the same as a full resampling
SMOOTH_FROM = 1.5  # shrink factor from which averaging is more accurate than cubic

cv2.setNumThreads(1)  # processes are the parallelism


@dataclass(frozen=True, slots=True)
class Recode:
    """How the images are stored."""

    max_side: int = 0  # longest side, pixels; 0: any
    format: str = ""  # one of `FORMATS`; "": as it was, or PNG for a format that is not among them
    quality: int = 90  # of JPEG and WebP, 1 to 100


def recode_image(data: bytes, how: Recode) -> tuple[bytes, str]:
    """Return the image as `how` wants it, and its extension.

    An image that is small enough and of the right format is returned as it is. Else it is turned
    upright as EXIF or XMP says, the first frame of an animation is taken, 16 bits a channel
    become 8, CMYK and palettes become RGB, JPEG lies on white where it was transparent, and all
    metadata (colour profile, EXIF) goes. JPEG is decoded no larger than is needed.

    Raises BadSampleError if the image does not decode.
    """
    shrinks = how.max_side > 0 and how.format in ("", "jpeg")
    size = plain_size(data, COLOURED) if shrinks else None
    if size is not None and max(size) > how.max_side:  # most photographs: without Pillow
        pixels = _shrunk_jpeg(data, size, how.max_side, "RGB")
        if pixels is not None:
            return _jpeg(pixels, how.quality), "jpg"
    with checked_image(data) as image:
        image_format = "JPEG" if image.format == "MPO" else image.format or ""
        target = how.format.upper() or (image_format if image_format.lower() in FORMATS else "PNG")
        too_large = 0 < how.max_side < max(image.size)
        if not too_large and image_format == (how.format.upper() or image_format):
            image.load()
            return data, EXTENSIONS[image_format]
        stored = orientation(image)
        changed = _shrunk(data, image, how.max_side) if too_large else _averageable(image)
        return _encoded(turned(changed, stored), target, how.quality), EXTENSIONS[target]


def _shrunk(data: bytes, image: Image.Image, max_side: int) -> Image.Image:
    """Shrink an image that is too large; its orientation is not applied yet."""
    pixels = None
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
        colours = "RGB" if image.mode == "RGB" else "GRAY"
        pixels = _shrunk_jpeg(data, image.size, max_side, colours)
    if pixels is None:
        size = _fitted(image.size, max_side)
        return _averageable(image).resize(size, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    return Image.fromarray(pixels)


def _shrunk_jpeg(data: bytes, size: tuple[int, int], max_side: int, colours: str) -> Pixels | None:
    """Decode and shrink a JPEG: uint8 (h, w, 3) or, in grey, (h, w); None if it is damaged."""
    target = _fitted(size, max_side)
    pixels = decode_at(data, size, scale_for(max(size) / max_side), colours=colours)
    if pixels is None:
        return None
    smooth = max(pixels.shape[:2]) >= SMOOTH_FROM * max_side
    kind = cv2.INTER_AREA if smooth else cv2.INTER_CUBIC
    return cast(Pixels, cv2.resize(pixels, target, interpolation=kind))


def _fitted(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Return width and height with `max_side` for the longer one, in proportion."""
    width, height = (max(1, round(side * max_side / max(size))) for side in size)
    return width, height


def _jpeg(pixels: Pixels, quality: int) -> bytes:
    colours = "GRAY" if pixels.ndim == 2 else "RGB"
    pixels = np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1))
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality, colours, "420")
    return encoded


def _encoded(image: Image.Image, target: str, quality: int) -> bytes:
    """Encode an upright image, without what Pillow would carry over."""
    if target == "JPEG":
        return _jpeg(np.asarray(_on_white(image)), quality)
    if image.mode == "CMYK":
        image = image.convert("RGB")
    buffer = io.BytesIO()
    options = {} if target == "PNG" else {"quality": quality}
    Image.fromarray(np.asarray(image)).save(buffer, target, **options)
    return buffer.getvalue()


def _averageable(image: Image.Image) -> Image.Image:
    """Bring the image to L, RGB, CMYK or RGBA: palettes or 16 bits cannot be averaged."""
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    if is_wide(image):
        return narrowed(image)
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "L" else image.convert("RGB")
