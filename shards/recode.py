"""Images made smaller, or brought to one format; what already fits keeps its bytes."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from shards.check import EXTENSIONS, decoding

FORMATS = ("jpeg", "png", "webp")
REDUCING_GAP = 3.0  # Pillow: from 3 on hardly to be told from a fair resampling


@dataclass(frozen=True, slots=True)
class Recode:
    """How the images are stored."""

    max_side: int = 0  # longest side, pixels; 0: any
    format: str = ""  # one of `FORMATS`; "": as it was, or PNG for a format that is not among them
    quality: int = 90  # of JPEG and WebP, 1 to 100


def recode_image(data: bytes, how: Recode) -> tuple[bytes, str]:
    """Return the image as `how` wants it, and its extension.

    An image that is small enough and of the right format is returned as it is. Else it is turned
    upright by its EXIF orientation, the first frame of an animation is taken, 16 bits a channel
    become 8, CMYK and palettes become RGB, JPEG lies on white where it was transparent, and all
    metadata (colour profile, EXIF) goes.

    Raises BadSampleError if the image does not decode.
    """
    with decoding(data) as image:
        image_format = "JPEG" if image.format == "MPO" else image.format or ""
        target = how.format.upper() or (image_format if image_format.lower() in FORMATS else "PNG")
        too_large = 0 < how.max_side < max(image.size)
        if not too_large and image_format == (how.format.upper() or image_format):
            image.load()
            return data, EXTENSIONS[image_format]
        # Resampling palettes or 16 bits makes no sense.
        changed = image if image.mode in ("L", "RGB", "CMYK") else _to_8_bits(image)
        if too_large:  # the JPEG decoder shrinks on its own as far as it can
            changed.thumbnail(
                (how.max_side, how.max_side), Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP
            )
        upright = ImageOps.exif_transpose(changed)
        if target == "JPEG":
            upright = _on_white(upright)
        elif upright.mode == "CMYK":
            upright = upright.convert("RGB")
        buffer = io.BytesIO()
        plain = Image.fromarray(np.asarray(upright))  # without what Pillow would carry over
        plain.save(buffer, target, **({} if target == "PNG" else {"quality": how.quality}))
        return buffer.getvalue(), EXTENSIONS[target]


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Bring any mode to L, RGB or RGBA."""
    if image.mode.startswith("I"):  # 16 bits a pixel, whichever way they are stored
        values = np.asarray(image).clip(0, 65535) // 257
        result = Image.fromarray(values.astype(np.uint8))
        result.info |= {key: image.info[key] for key in ("exif",) if key in image.info}
        return result
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "L" else image.convert("RGB")
