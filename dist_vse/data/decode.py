"""From the bytes of an image file to a square of 8-bit RGB, or of a vector's file to numbers."""

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dist_vse.data.image_file import is_wide, narrowed, open_image, orientation
from dist_vse.data.index import IMAGE_FORMATS
from dist_vse.data.jpeg import Pixels, decode_at, plain_size, scale_for
from dist_vse.data.vectors import is_vector, vector_place

CROP_TRIES = 10
LOG_CROP_ASPECT = math.log(4 / 3)  # width : height of a random crop lies between 3/4 and 4/3
LUMA = np.array([0.299, 0.587, 0.114])  # of R, G, B: ITU-R BT.601, as Pillow and torchvision

cv2.setNumThreads(1)  # data workers are the parallelism

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
RESAMPLINGS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class BadSampleError(Exception):
    """A sample that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Transform:
    """How an image becomes a square of `size` pixels."""

    size: int
    random_crop: bool = False  # else: the largest square in the middle
    min_crop_area: float = 1.0
    flip: bool = False
    color_jitter: float = 0.0
    scaled: bool = False
    """Decode JPEG no larger than the crop needs, for speed; else in full and by `resampling`."""
    squash: bool = False
    """Without a random crop: the whole image becomes the square."""
    crop_share: float = 1.0  # of the middle square's side, where the crop isn't random
    resampling: str = "bicubic"
    vector: bool = False
    """The files are vectors of `size` float32 numbers, not images."""

    def empty(self, rows: int, *, without: bool = False) -> NDArray[Any]:
        """Return memory for so many rows; `without` leaves out what is not read."""
        if self.vector:
            return np.empty((rows, 0 if without else self.size), np.float32)
        side = 0 if without else self.size
        # Channels last: decoders write and convolutions read them in this order.
        return np.empty((rows, side, side, 3), np.uint8)

    @property
    def is_random(self) -> bool:
        """Whether the same file can give different squares."""
        return self.random_crop or self.flip or self.color_jitter > 0


def decode_image(
    data: bytes,
    transform: Transform,
    rng: np.random.Generator | None = None,
    *,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Decode, crop and resize an image file: uint8 (3, size, size), RGB.

    Reads all of Pillow's modes (transparency lies on white, 16 and 32 bits become 8), turns the
    image upright by its EXIF orientation, and takes the first frame of an animation. `rng` is
    needed where the transform is random. `out` (size, size, 3) takes the pixels, if it is given.
    Where the transform takes vectors, the file is one, and the result float32 (size,).

    Raises BadSampleError if the file is broken or holds more pixels than Pillow deems safe.
    """
    assert rng is not None or not transform.is_random, "needs a generator"
    out = transform.empty(1)[0] if out is None else out
    if transform.vector:
        _read_vector(data, out)
        return out
    try:
        _transform(data, transform, rng, out)
    except MemoryError:
        raise  # ours, not the file's
    except UnidentifiedImageError as error:  # its own message holds an address in memory
        known = f"not an image file ({', '.join(IMAGE_FORMATS)})"
        if is_vector(data):
            known = "a vector and no image: set model.image.kind=vectors"
        raise BadSampleError(known if data else "no bytes") from error
    except Exception as error:  # a broken file can raise anything from within a codec
        raise BadSampleError(f"{type(error).__name__}: {error}") from error
    pixels: Pixels = out.transpose(2, 0, 1)
    return pixels


def _read_vector(data: bytes, out: NDArray[np.float32]) -> None:
    """Fill `out` (size,) with a vector's numbers."""
    if not is_vector(data):
        raise BadSampleError("an image and no vector: model.image.kind=vectors reads none")
    try:
        start, count = vector_place(data)
    except ValueError as error:
        raise BadSampleError(str(error)) from error
    if count != len(out):
        raise BadSampleError(
            f"a vector of {count} numbers, and model.image.size is {len(out)}: make them equal"
        )
    out[:] = np.frombuffer(data, np.float32, count, start)
    if not np.isfinite(out).all():
        raise BadSampleError("the vector has numbers that are not finite")


def _transform(
    data: bytes, transform: Transform, rng: np.random.Generator | None, out: Pixels
) -> None:
    """Fill `out` (size, size, 3)."""
    image = None
    size = plain_size(data) if transform.scaled else None
    if size is None:
        image = open_image(data)
        size = image.size
    flip = transform.flip and rng is not None and rng.random() < 0.5
    # The crop is taken before the image is turned upright: both kinds treat width and height alike.
    if transform.random_crop and rng is not None:
        box = random_box(*size, transform.min_crop_area, rng)
    elif transform.squash:
        box = 0.0, 0.0, float(size[0]), float(size[1])
    else:
        box = center_box(*size, transform.crop_share)
    if image or not _decode_scaled(data, size, box, out):
        _decode_any(data, image or open_image(data), transform, box, out)
    if flip:
        cv2.flip(out, 1, dst=out)
    if transform.color_jitter > 0 and rng is not None:
        jitter_colors(out, transform.color_jitter, rng)


def _decode_any(
    data: bytes, image: Image.Image, transform: Transform, box: Box, out: Pixels
) -> None:
    """Crop and resize whatever Pillow can open, and turn it upright."""
    stored = orientation(image)
    scaled = transform.scaled and image.format == "JPEG" and image.mode in ("RGB", "L")
    if not (scaled and _decode_scaled(data, image.size, box, out)):
        image = _resizable(image)
        size = (transform.size, transform.size)
        how = RESAMPLINGS[transform.resampling]
        image = image.resize(size, how, box=box, reducing_gap=2.0)
        out[:] = np.asarray(image.convert("RGB"))
    if stored > 1:
        out[:] = _upright(out.copy(), stored)


def center_box(width: int, height: int, share: float = 1.0) -> Box:
    """Return the square in the middle of an image: the largest one, or a share of its side."""
    side = min(width, height) * share
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, min_area: float, rng: np.random.Generator) -> Box:
    """Draw a crop of `min_area` to all of the image's area, of aspect 3/4 to 4/3.

    As torchvision's RandomResizedCrop, in fractions of pixels; the middle square if no draw fits.
    """
    for _ in range(CROP_TRIES):
        draws: list[float] = rng.random(4).tolist()
        area = width * height * (min_area + draws[0] * (1 - min_area))
        aspect = math.exp((2 * draws[1] - 1) * LOG_CROP_ASPECT)
        if area * aspect <= width * width and area <= height * height * aspect:
            crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
            left, top = draws[2] * (width - crop_width), draws[3] * (height - crop_height)
            # 0 and min: rounding may exceed the image by a tiny amount
            left, top = max(left, 0.0), max(top, 0.0)
            return left, top, min(left + crop_width, width), min(top + crop_height, height)
    return center_box(width, height)


def jitter_colors(pixels: Pixels, strength: float, rng: np.random.Generator) -> None:
    """Change brightness, contrast and saturation in place, by factors of 1 +- `strength`.

    The three of torchvision's ColorJitter in that order, as one linear map: nothing is clipped
    between them.
    """
    brightness, contrast, saturation = rng.uniform(max(0.0, 1 - strength), 1 + strength, 3)
    grey = brightness * float(LUMA @ np.array(cv2.mean(pixels)[:3]))
    matrix = saturation * np.eye(3) + (1 - saturation) * LUMA
    offset = np.full((3, 1), (1 - contrast) * grey)
    cv2.transform(pixels, np.hstack([contrast * brightness * matrix, offset]), dst=pixels)


def _decode_scaled(data: bytes, size: tuple[int, int], box: Box, out: Pixels) -> bool:
    """Decode a JPEG at the smallest scale that serves the box; return False if it is damaged.

    The box is rounded to whole pixels of the decoded image, at most half of a pixel of `out`.
    """
    scale = scale_for(min(box[2] - box[0], box[3] - box[1]) / len(out))
    pixels = decode_at(data, size, scale)
    if pixels is None:
        return False
    left, right = _round(box[0] / scale, box[2] / scale, pixels.shape[1])
    top, bottom = _round(box[1] / scale, box[3] / scale, pixels.shape[0])
    # Less than two pixels become one here, so linear interpolation is smooth enough.
    cv2.resize(
        pixels[top:bottom, left:right], out.shape[:2], dst=out, interpolation=cv2.INTER_LINEAR
    )
    return True


def _round(start: float, stop: float, length: int) -> tuple[int, int]:
    """Round an interval to whole numbers in 0 to `length`, at least one apart."""
    first = min(round(start), length - 1)
    return first, max(first + 1, min(round(stop), length))


def _upright(pixels: Pixels, stored: int) -> Pixels:
    """Turn the stored pixels upright (EXIF 2.3, table 6)."""
    if stored >= 5:
        pixels = pixels.transpose(1, 0, 2)
    rows = -1 if stored in (3, 4, 7, 8) else 1
    columns = -1 if stored in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def _resizable(image: Image.Image) -> Image.Image:
    """Bring the image to a mode whose values may be averaged, without transparency."""
    if is_wide(image):
        return narrowed(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")
