"""Photographs to measure with: parts of scikit-image's public-domain ones, enlarged to 640x480."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from dist_vse.common.errors import UserError

WIDTH, HEIGHT = 640, 480
QUALITY = 93  # enlarged pixels are smooth: with less, the files would be smaller than COCO's
SUBJECTS = {
    "astronaut": "a woman astronaut in an orange space suit smiles in front of a flag",
    "chelsea": "a tabby cat lies on a blanket and looks past the camera with green eyes",
    "coffee": "a cup of black coffee with a spoon on its saucer on a wooden table",
    "rocket": "a white rocket stands on its launch pad by the sea before the start",
}


def photographs(count: int, *, seed: int = 0) -> Iterator[tuple[bytes, str]]:
    """Yield JPEG files with a caption each; no two show the same part of a photograph.

    Raises UserError if scikit-image is missing.
    """
    try:
        from skimage import data
    except ImportError:
        raise UserError("the photographs come with scikit-image; pip install -e '.[dev]'") from None
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(getattr(data, name)()) for name in SUBJECTS]
    for number in range(count):
        kind = number % len(images)
        buffer = io.BytesIO()
        _part(images[kind], rng).save(buffer, "JPEG", quality=QUALITY)
        yield buffer.getvalue(), f"{list(SUBJECTS.values())[kind]}, part {number}"


def _part(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut out three quarters of an image at least, mirror it or not, and enlarge it."""
    width = min(image.width, image.height * WIDTH / HEIGHT) * rng.uniform(0.75, 1.0)
    height = width * HEIGHT / WIDTH
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    part = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part
