"""The images to search in: embedded now, or read from a file that `dist-vse embed` wrote.

Such a file says whose features it holds, so that a stale one is refused: a hash of the model's
weights, the data set's fingerprint and the split. Shapes: n images, d embedding.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.common.reading import BadFileError
from dist_vse.data.embedded_file import read_embedded
from dist_vse.data.index import Index
from dist_vse.evaluation.evaluate import Embedded
from dist_vse.losses.nested import first_features
from dist_vse.tools.search.codes import Bits, Int8Codes, binary_top_k, int8_top_k

Origin = dict[str, str]
_WHAT = {"weights": "another model", "data": "another data set", "split": "another split"}


@dataclass(frozen=True)
class Gallery:
    """Images with their names."""

    keys: list[str]
    captions: list[str]  # the first one of each image
    features: Tensor  # float32 (n, d), of unit length; no rows where there are codes
    codes: Int8Codes | None = None
    bits: Bits | None = None
    text_center: Tensor | None = None  # (d,), of the bits of texts

    @property
    def width(self) -> int:
        """Numbers of a feature."""
        return self.features.shape[1]

    def at_width(self, width: int | None) -> "Gallery":
        """Return the first `width` numbers of each feature; None: all.

        Raises UserError for more than there are, and for less of those in fewer bits.
        """
        if width is None or width == self.width:
            return self
        if self.codes is not None or width > self.width:
            raise UserError(
                f"--width ({width}) does not fit the index, whose features have {self.width} "
                "numbers; write one with `dist-vse embed --width`"
            )
        return replace(self, features=first_features(self.features, width))

    def search_codes(self, by_text: Tensor, by_image: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k best cosines and rows (q, k), by the bits if there are any."""
        assert self.codes is not None
        queries = torch.cat([by_text, by_image])
        if self.bits is None or self.text_center is None:
            return int8_top_k(queries, self.codes, k)
        kinds = zip((self.text_center, self.bits.center), (by_text, by_image), strict=True)
        centers = torch.cat([center.expand_as(of_kind) for center, of_kind in kinds])
        return binary_top_k(queries, centers, self.bits, self.codes, k)


def origin(model: nn.Module, index: Index, split: str) -> Origin:
    """Return what features depend on."""
    return {"weights": _hash(model), "data": index.fingerprint(), "split": split}


def gallery_of(found: Embedded) -> Gallery:
    """Take the images of an embedded split."""
    return _gallery(found.keys, found.captions, found.image_features, found.image_of_text)


def read_gallery(path: Path, wanted: Origin) -> Gallery:
    """Read a `.safetensors` file of `dist-vse embed`.

    Raises UserError if it is none, or of another model, data set or split than wanted.
    """
    remedy = f"write it with `dist-vse embed RUN {path.with_suffix('.safetensors')}`"
    try:
        file = read_embedded(path)
    except BadFileError as error:
        raise UserError(f"{path}: {error}; {remedy}") from error
    for name, value in wanted.items():
        if file.origin.get(name) != value:
            detail = f" ({file.origin.get(name)})" if name == "split" else ""
            raise UserError(f"{path}: stale, it is of {_WHAT[name]}{detail}; {remedy} --split ...")
    more, codes, bits = file.tensors, None, None
    features = more["image_features"]
    if "image_step" in more:
        codes = Int8Codes(features, more["image_low"], more["image_step"])
        features = features[:0].float()
    elif not bool(features.isfinite().all()):
        raise UserError(f"{path}: has features that are not finite; {remedy}")
    if "image_bits" in more:
        bits = Bits(more["image_bits"], more["image_center"])
    found = _gallery(file.keys, file.captions, features.float(), more["image_of_text"])
    return replace(found, codes=codes, bits=bits, text_center=more.get("text_center"))


def _gallery(keys: list[str], captions: list[str], features: Tensor, of_text: Tensor) -> Gallery:
    rows, first = np.unique(of_text.numpy(), return_index=True)
    said = [""] * len(keys)
    for row, text in zip(rows.tolist(), first.tolist(), strict=True):
        said[row] = captions[text]
    return Gallery(keys, said, features)


def _hash(model: nn.Module) -> str:
    """Return 32 hex digits that change when any weight does; XXH3 reads gigabytes a second."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
