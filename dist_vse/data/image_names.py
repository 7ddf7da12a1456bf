"""Which file names are images'. Whether one can be read, its bytes decide."""

import os

READ = frozenset(["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"])
"""Extensions of the formats that are read (`IMAGE_FORMATS`)."""
_OTHER = (
    "apng arw avif cr2 dib dng eps exr heic heif hif ico j2k jp2 jpx jxl mpo nef pbm pgm pjpeg pnm "
    "ppm psd svg tga"
)
IMAGES = READ | frozenset(_OTHER.split())
"""Extensions of all images: one that is not read is a bad sample, not none."""


def is_image_name(name: str) -> bool:
    """Return whether the file's name has an extension of images."""
    return os.path.splitext(name)[1][1:].lower() in IMAGES
