"""A teacher's features of the training split, by the ids of images and captions.

The file is what `dist-vse embed` writes as `.safetensors`; any program may write one alike. n
images, m captions, b pairs of a batch, d' the teacher's embedding.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dist_vse.common.errors import UserError
from dist_vse.common.reading import BadFileError
from dist_vse.data.embedded_file import TEACHER, read_embedded
from dist_vse.data.index import image_id
from dist_vse.data.samples import Batch

REMEDY = "write it with `dist-vse embed TEACHER FILE.safetensors --data DIR --split SPLIT`"


class Teacher:
    """Features of images (n, d') and captions (m, d'), found by id; opened from a file.

    They stay in the file until they are looked at (a memory map).
    """

    def __init__(self, path: Path) -> None:
        """Open a file. Raises UserError if it is none of `dist-vse embed`, or one in fewer bits."""
        self.path = path
        try:
            file = read_embedded(path, TEACHER)
        except BadFileError as error:
            raise UserError(f"loss.teacher: {path}: {error}; {REMEDY}") from error
        images, texts, ids = (
            file.tensors[name] for name in ("image_features", "text_features", "image_ids")
        )
        if not (images.is_floating_point() and texts.is_floating_point()):
            raise UserError(f"loss.teacher: {path}: holds {images.dtype}; write it in float32")
        text_ids = torch.tensor([image_id(caption) for caption in file.captions], dtype=torch.int64)
        self._images, self._texts = _ById(ids, images), _ById(text_ids, texts)

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return float32 features (b, d') of a batch's images and captions, of unit length.

        Raises UserError if one of them is not in the file.
        """
        found = []
        for kind, features, ids in (
            ("images", self._images, batch.image_ids),
            ("captions", self._texts, batch.text_ids),
        ):
            rows = features.rows(ids)
            if rows is None:
                raise UserError(
                    f"loss.teacher: {self.path}: has no features of {kind} that are trained on; "
                    f"{REMEDY} of the training split"
                )
            found.append(rows)
        return found[0], found[1]


class _ById:
    """Rows that are looked up by their id; of equal ids the first counts."""

    def __init__(self, ids: Tensor, features: Tensor) -> None:
        self._ids, self._order = ids.sort(stable=True)
        self._features = features

    def rows(self, wanted: Tensor) -> Tensor | None:
        """Return the rows of ids (b,); None if one is not there."""
        place = torch.searchsorted(self._ids, wanted)
        there = place < len(self._ids)
        if not bool(there.all()) or not torch.equal(self._ids[place], wanted):
            return None
        return normalize(self._features[self._order[place]].float(), dim=1)


def with_teacher(batches: Iterator[Batch], teacher: Teacher | None) -> Iterator[Batch]:
    """Return the batches, with the teacher's features if there is one."""
    if teacher is None:
        return batches
    return (replace(batch, teacher=teacher.features(batch)) for batch in batches)
