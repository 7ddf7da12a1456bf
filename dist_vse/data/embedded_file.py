"""The file that `dist-vse embed` writes. Anybody may have made it, so all of it is checked.

Shapes: n images, m captions, d embedding.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_vse.common.errors import first_line
from dist_vse.common.reading import BadFileError, parse_json

MAX_BYTES = 1 << 37
"""Of all keys, or of all captions: a billion captions of a hundred letters."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NAMES = ("keys", "captions")

TEACHER = ("image_features", "text_features", "image_ids", "captions")
"""What a teacher's file must hold, which any program may write."""
ALL = (*TEACHER, "image_of_text", "keys")


@dataclass(frozen=True)
class EmbeddedFile:
    """What a file holds; its tensors stay in the file until they are looked at (a memory map)."""

    origin: dict[str, str]
    keys: list[str]  # n; none where the file has none
    captions: list[str]  # m
    tensors: dict[str, Tensor]
    """`image_features` (n, d), `text_features` (m, d), `image_of_text` (m,), `image_ids` (n,), and
    what `tools.search.codes.coded` adds."""


def read_embedded(path: Path, required: Collection[str] = ALL) -> EmbeddedFile:
    """Read a `.safetensors` file of `dist-vse embed`.

    Raises BadFileError if it lacks what is required, or holds other types or sizes than embed
    writes.
    """
    if not path.is_file():
        raise BadFileError("no such file")
    try:
        return _read(path, required)
    except BadFileError as error:
        raise BadFileError(f"no file of `dist-vse embed` ({error})") from error


def _read(path: Path, required: Collection[str]) -> EmbeddedFile:
    try:
        with safe_open(path, "pt") as file:
            origin = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadFileError(first_line(error)) from error
    if missing := [name for name in required if name not in tensors]:
        raise BadFileError(f"has no {missing[0]}")
    _check(tensors)
    names = {name: _texts(tensors.pop(name), name) for name in _NAMES if name in tensors}
    for name, of in zip(_NAMES, ("image_features", "text_features"), strict=True):
        if name in names and len(names[name]) != len(tensors[of]):
            raise BadFileError(f"has {len(names[name])} {name} and {len(tensors[of])} {of}")
    return EmbeddedFile(origin, names.get("keys", []), names["captions"], tensors)


def _texts(data: Tensor, name: str) -> list[str]:
    texts = parse_json(bytes(data.numpy()), list, max_bytes=MAX_BYTES)
    for text in texts:
        if not isinstance(text, str):
            raise BadFileError(f"{name} holds what is no text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadFileError(f"{name} holds half a character") from error
    return texts


def _check(tensors: Mapping[str, Tensor]) -> None:
    """Raise BadFileError for a tensor of another type or shape, and for codes without a part."""
    features = tensors["image_features"]
    n, d = features.shape if features.ndim == 2 else (0, 0)
    m = len(tensors["text_features"]) if tensors["text_features"].ndim else 0
    coded, bits = "image_step" in tensors, "image_bits" in tensors
    wanted: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {}
    for kind, rows in (("image", n), ("text", m)):
        wanted[f"{kind}_features"] = (torch.int8,) if coded else FLOATS, (rows, d)
        if coded or bits:
            wanted |= {f"{kind}_{part}": (FLOATS, (d,)) for part in ("low", "step")}
        if bits:
            wanted[f"{kind}_bits"] = (torch.uint8,), (rows, -(-d // 8))
            wanted[f"{kind}_center"] = FLOATS, (d,)
    for name, rows in (("image_of_text", m), ("image_ids", n)):
        if name in tensors:
            wanted[name] = (torch.int64,), (rows,)
    for name in _NAMES:
        if name in tensors:
            wanted[name] = (torch.uint8,), (tensors[name].numel(),)
    for name, (types, shape) in wanted.items():
        found = tensors.get(name)
        if found is None:
            raise BadFileError(f"has no {name}")
        if found.dtype not in types or tuple(found.shape) != shape or not all((n, m, d)):
            raise BadFileError(f"{name} is {found.dtype} of shape {tuple(found.shape)}")
    rows_of_texts = tensors.get("image_of_text")
    if rows_of_texts is not None:
        low, high = rows_of_texts.aminmax()
        if low < 0 or high >= n:
            raise BadFileError(f"image_of_text names images outside of the {n}")
