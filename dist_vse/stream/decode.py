"""From the bytes of an image file to a square of 8-bit RGB."""

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

CROP_TRIES = 10
CROP_ASPECT = 4 / 3  # width : height of a random crop lies between 3/4 and 4/3

# How to turn what is stored so that it stands upright, by the EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


class BadSampleError(Exception):
    """A sample that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Transform:
    """How an image becomes a square of `size` pixels."""

    size: int
    random_crop: bool = False  # else: the largest square in the middle
    min_crop_area: float = 1.0
    flip: bool = False


def decode_image(
    data: bytes, transform: Transform, rng: np.random.Generator | None = None
) -> NDArray[np.uint8]:
    """Decode, crop and resize an image file: uint8 (3, size, size), RGB.

    Reads all of Pillow's modes (transparency lies on white, 16 bits become 8), turns the image
    upright by its EXIF orientation, and takes the first frame of an animation. For a random crop of
    at least twice the size, JPEG is decoded at a reduced scale, which is faster and smooths a
    little; the middle crop stays plain bicubic, so that evaluation compares with that of others.
    `rng` is needed for a random crop or flip only.

    Raises BadSampleError if the file is broken or holds more pixels than Pillow deems safe.
    """
    assert rng is not None or not (transform.random_crop or transform.flip), "needs a generator"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data))
        return _transform(image, transform, rng)
    except MemoryError:
        raise  # ours, not the file's
    except UnidentifiedImageError as error:  # its own message holds an address in memory
        raise BadSampleError("not an image file" if data else "no bytes") from error
    except Exception as error:  # a broken file can raise anything from within a codec
        raise BadSampleError(f"{type(error).__name__}: {error}") from error


def _transform(
    image: Image.Image, transform: Transform, rng: np.random.Generator | None
) -> NDArray[np.uint8]:
    size = transform.size
    upright = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    flip = transform.flip and rng is not None and rng.random() < 0.5
    # The crop is taken before the image is turned upright: both kinds treat width and height alike.
    if transform.random_crop and rng is not None:
        box = random_box(image.width, image.height, transform.min_crop_area, rng)
        image, box = _draft(image, box, size)
    else:
        box = center_box(image.width, image.height)
    image = _resizable(image)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    image = image.convert("RGB")
    if upright is not None:
        image = image.transpose(upright)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (3, h, w)


def center_box(width: int, height: int) -> Box:
    """Return the largest square in the middle of an image."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, min_area: float, rng: np.random.Generator) -> Box:
    """Draw a crop of `min_area` to all of the image's area, of aspect 3/4 to 4/3.

    As torchvision's RandomResizedCrop, in fractions of pixels; the middle square if no draw fits.
    """
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(-1.0, 1.0) * math.log(CROP_ASPECT))
        crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if crop_width <= width and crop_height <= height:
            left = rng.uniform(0.0, width - crop_width)
            top = rng.uniform(0.0, height - crop_height)
            # min: the sum may round to a hair more than the image has
            return left, top, min(left + crop_width, width), min(top + crop_height, height)
    return center_box(width, height)


def _draft(image: Image.Image, box: Box, size: int) -> tuple[Image.Image, Box]:
    """Let the JPEG decoder halve the image as often as the crop keeps `size` pixels."""
    width, height = image.size
    reduction = min(box[2] - box[0], box[3] - box[1]) / size
    if reduction < 2 or image.format != "JPEG":
        return image, box
    image.draft(None, (math.ceil(width / reduction), math.ceil(height / reduction)))
    x, y = image.width / width, image.height / height
    right, bottom = min(box[2] * x, image.width), min(box[3] * y, image.height)
    return image, (box[0] * x, box[1] * y, right, bottom)


def _resizable(image: Image.Image) -> Image.Image:
    """Bring the image to a mode whose values may be averaged, without transparency."""
    if image.mode.startswith("I"):  # 16 bits a pixel, whichever way they are stored
        values = np.asarray(image).clip(0, 65535) // 257
        return Image.fromarray(values.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")
