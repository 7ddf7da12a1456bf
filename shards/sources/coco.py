"""COCO's own captions file: `captions_train2017.json` and similar files.

Source: https://cocodataset.org/#format-data (Captions). `images` names the files, `annotations` one
caption each by `image_id`; the order of the two lists is not the same.
"""

import re
from collections import defaultdict
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

_SPLIT = re.compile(r"(train|val|test)\d*$")


def read_coco(
    path: Path, *, images: Path | None = None, split: str | None = None
) -> Iterator[Record]:
    """Yield the images of the file in its order, with their captions in that of the annotations.

    All is of `split`; without it, of what the file's name ends in (`captions_val2017.json` is val),
    or of train. Images lie under `images`, or beside the file. One without annotations is bad.

    Raises UserError if the file is not of this format, or annotates an image that it lacks.
    """
    try:
        content = load_json(read_text(existing_file(path)))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error}); download it again") from error
    root = existing_folder(images) if images else path.parent
    named = _SPLIT.search(path.stem)
    split = split or (named[1] if named else "train")
    annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
    part = "annotations"
    try:
        for number, annotation in enumerate(content["annotations"]):
            part = f"annotations[{number}]"
            _ = annotation["caption"], annotation["id"]
            annotations[annotation["image_id"]].append(annotation)
        part = "images"
        for number, entry in enumerate(content["images"]):
            part = f"images[{number}]"
            yield _record(entry, annotations.pop(entry["id"], []), root, split)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: {part} is not of COCO's format ({error!r}); give a file such as "
            "captions_train2017.json"
        ) from error
    if annotations:
        raise UserError(
            f"{path}: annotates image {next(iter(annotations))}, which is not among its images; "
            "download the file again"
        )


def _record(
    entry: dict[str, Any], annotations: list[dict[str, Any]], root: Path, split: str
) -> Record:
    filename = entry["file_name"]
    captions = read_captions([annotation["caption"] for annotation in annotations])
    return Record(
        image=image_in(root, filename),
        captions=captions.texts,
        split=split,
        key=Path(filename).stem,
        extra={
            "filename": filename,
            "cocoid": entry["id"],
            "annotation_ids": [annotation["id"] for annotation in annotations],
        },
        fault=image_fault(filename) or captions.fault,
    )
