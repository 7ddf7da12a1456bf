"""A file of features that somebody else made: right, or one line, for search and for a teacher."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.common.reading import BadFileError
from dist_vse.data.embedded_file import read_embedded
from dist_vse.data.teacher import Teacher
from dist_vse.tools.search.gallery import read_gallery

ORIGIN = {"weights": "w", "data": "d", "split": "s"}


def _names(names: object) -> Tensor:
    return torch.tensor(list(json.dumps(names).encode()), dtype=torch.uint8)


def _tensors() -> dict[str, Tensor]:
    return {
        "image_features": torch.eye(3, 9),
        "text_features": torch.eye(4, 9),
        "image_ids": torch.arange(3),
        "image_of_text": torch.tensor([0, 1, 2, 2]),
        "keys": _names(["a", "b", "c"]),
        "captions": _names(["e", "f", "g", "h"]),
    }


INT8 = {
    "image_features": torch.zeros(3, 9, dtype=torch.int8),
    "text_features": torch.zeros(4, 9, dtype=torch.int8),
    **{f"{kind}_{part}": torch.ones(9) for kind in ("image", "text") for part in ("low", "step")},
}
BITS = {
    **INT8,
    "image_bits": torch.zeros(3, 2, dtype=torch.uint8),
    "text_bits": torch.zeros(4, 2, dtype=torch.uint8),
    "image_center": torch.zeros(9),
    "text_center": torch.zeros(9),
}


@pytest.mark.parametrize("codes", [{}, INT8, BITS], ids=["float32", "int8", "binary"])
def test_what_embed_writes_is_read(codes: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_file(_tensors() | codes, path, ORIGIN)
    gallery = read_gallery(path, ORIGIN)
    assert (gallery.keys, gallery.captions) == (["a", "b", "c"], ["e", "f", "g"])
    assert (gallery.codes is not None, gallery.bits is not None) == (
        bool(codes),
        "image_bits" in codes,
    )


def test_a_teacher_needs_no_keys(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_file({k: v for k, v in _tensors().items() if k not in ("keys", "image_of_text")}, path)
    Teacher(path)
    with pytest.raises(BadFileError, match="has no image_of_text"):
        read_embedded(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"image_of_text": torch.tensor([0, 1, 2, 3])}, "names images outside of the 3"),
        ({"image_of_text": torch.tensor([0, 1, 2, -1])}, "names images outside of the 3"),
        ({"image_of_text": torch.rand(4)}, "image_of_text is torch.float32 of shape (4,)"),
        ({"image_of_text": torch.arange(3)}, "image_of_text is torch.int64 of shape (3,)"),
        ({"image_ids": torch.arange(2)}, "image_ids is torch.int64 of shape (2,)"),
        ({"image_ids": torch.zeros(3, 3, dtype=torch.int64)}, "image_ids is torch.int64"),
        ({"keys": _names([1, 2, 3])}, "keys holds what is no text"),
        ({"captions": _names(["a", None, [], {}])}, "captions holds what is no text"),
        ({"keys": _names({"a": 1})}, "holds a dict, not a list"),
        ({"keys": _names(["a"])}, "has 1 keys and 3 image_features"),
        ({"captions": _names(["a"])}, "has 1 captions and 4 text_features"),
        ({"keys": _names(["\ud800", "b", "c"])}, "keys holds half a character"),
        ({"captions": torch.zeros(4)}, "captions is torch.float32 of shape (4,)"),
        ({"keys": torch.zeros(4, dtype=torch.bfloat16)}, "keys is torch.bfloat16"),
        ({"keys": torch.zeros(9, dtype=torch.uint8)}, "no JSON"),
        ({"image_features": torch.rand(3)}, "image_features is torch.float32 of shape (3,)"),
        ({"image_features": torch.rand(2, 9)}, "image_ids is torch.int64 of shape (3,)"),
        ({"image_features": torch.rand(0, 9)}, "image_features is torch.float32 of shape (0, 9)"),
        ({"image_features": torch.zeros(3, 9, dtype=torch.int64)}, "image_features is torch.int64"),
        ({"text_features": torch.rand(4, 7)}, "text_features is torch.float32 of shape (4, 7)"),
        ({"text_features": torch.tensor(0.0)}, "no file of `dist-vse embed`"),
        ({"image_step": torch.rand(9)}, "image_features is torch.float32"),
        ({**INT8, "image_low": torch.rand(8)}, "image_low is torch.float32 of shape (8,)"),
        ({**BITS, "image_bits": torch.zeros(3, 1, dtype=torch.uint8)}, "image_bits is torch.uint8"),
        ({"image_bits": torch.zeros(3, 2, dtype=torch.uint8)}, "has no image_low"),
    ],
)
def test_anything_else_is_one_line(change: dict[str, Tensor], why: str, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_file(_tensors() | change, path, ORIGIN)
    for read in (lambda: read_gallery(path, ORIGIN), lambda: Teacher(path)):
        with pytest.raises(UserError) as caught:
            read()
        assert why in str(caught.value) and "\n" not in str(caught.value)


def test_features_that_are_not_finite_are_not_searched(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_file(_tensors() | {"image_features": torch.full((3, 9), torch.nan)}, path, ORIGIN)
    with pytest.raises(UserError, match="features that are not finite"):
        read_gallery(path, ORIGIN)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x10" + bytes(7) + b"{" * 16])
def test_what_is_no_safetensors_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "e.safetensors").write_bytes(content)
    with pytest.raises(BadFileError, match="no file of `dist-vse embed`"):
        read_embedded(tmp_path / "e.safetensors")
