"""Karpathy's splits of COCO, Flickr30K and Flickr8K: `dataset_coco.json` and similar files.

Source: https://cs.stanford.edu/people/karpathy/deepimagesent/. The file names the images, their
split and their captions; the images themselves lie under `images` (COCO's in train2014 and
val2014, as `filepath` says). An image has five captions as a rule, six or seven at times.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.shards.captions import read_captions
from dist_vse.shards.json_text import load_json
from dist_vse.shards.record import Record
from dist_vse.shards.sources.paths import (
    existing_file,
    existing_folder,
    image_fault,
    image_in,
    read_text,
)

EXTRA = ("filename", "imgid", "cocoid", "sentids")


def read_karpathy(
    path: Path, *, images: Path | None = None, restval: str = "train"
) -> Iterator[Record]:
    """Yield the images of the file in its order, with their raw captions.

    `restval` is the split that COCO's 30,504 restval images go to: train is the custom of all
    papers, restval keeps them apart. Without `images`, paths start from the file's folder.

    Raises UserError if the file is not of this format.
    """
    try:
        content = load_json(read_text(existing_file(path)))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error}); download it again") from error
    root = existing_folder(images) if images else path.parent
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f'{path}: no list "images"; give a file such as dataset_coco.json')
    for position, entry in enumerate(content["images"]):
        try:
            yield _record(entry, root, restval)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: images[{position}] is not of Karpathy's format ({error!r}); "
                "download the file again"
            ) from error


def _record(entry: dict[str, Any], root: Path, restval: str) -> Record:
    filename = entry["filename"]
    captions = read_captions([sentence["raw"] for sentence in entry["sentences"]])
    return Record(
        image=image_in(
            root, os.path.join(entry.get("filepath", ""), filename)
        ),  # Flickr's files have no filepath
        captions=captions.texts,
        split=restval if entry["split"] == "restval" else entry["split"],
        key=Path(filename).stem,
        extra={name: entry[name] for name in EXTRA if name in entry},
        fault=image_fault(filename) or captions.fault,
    )
