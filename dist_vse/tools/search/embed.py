"""The embeddings of a split, and files of them: `dist-vse embed`."""

import errno
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError, first_line
from dist_vse.common.files import atomic_output
from dist_vse.data.eval_stream import eval_batches
from dist_vse.data.index import Index, read_index
from dist_vse.data.samples import Placement
from dist_vse.evaluation.evaluate import Embedded, embed
from dist_vse.evaluation.width import AtWidth
from dist_vse.runs.folder import find_run, open_run
from dist_vse.runs.trained import open_trained
from dist_vse.tools.export.folder import DESCRIPTION
from dist_vse.tools.export.load import Embedder, load
from dist_vse.tools.search.codes import coded
from dist_vse.tools.search.gallery import Origin

BATCH = 64
_ROWS = 1 << 14
SUFFIXES = (".npy", ".safetensors", ".parquet")


def open_model(location: Path) -> Embedder:
    """Open a run, one of its checkpoints, or an exported folder.

    Raises UserError if it is none of these.
    """
    here = distributed.device()
    if (location / DESCRIPTION).is_file():
        return load(location, here)
    trained = open_trained(location)
    return Embedder(trained.model, trained.tokenizer, shape=trained.config.model, device=here)


def open_data(location: Path, data: str | None, *, allow_pipe: bool = False) -> Index:
    """Read the data set given, or that of the run."""
    if data is not None:
        return read_index(data, allow_pipe=allow_pipe)
    if (location / DESCRIPTION).is_file():
        raise UserError(f"{location}: an exported model has no data set; give --data DIR")
    return read_index(open_run(find_run(location)[0]).data.index, allow_pipe=allow_pipe)


def embed_split(model: Embedder, index: Index, split: str, width: int | None = None) -> Embedded:
    """Embed all images and captions of a split, each rank its share; at a width if given."""
    batches = eval_batches(
        index,
        split,
        model.tokenizer,
        model.shape.image,
        batch_size=BATCH,
        placement=Placement(distributed.rank(), distributed.world_size()),
    )
    return embed(AtWidth(model.model, width), batches, model.device)


def check_suffix(path: Path, precision: str = "float32") -> None:
    """Raise UserError for a file that `write_embeddings` cannot write."""
    if precision != "float32" and path.suffix != ".safetensors":
        raise UserError(f"{path}: --precision {precision} is written as .safetensors only")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: give a name that ends in {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            hint = "pip install 'dist_vse[parquet]'"
            raise UserError(f"{path}: .parquet needs pyarrow; {hint}") from None


def write_embeddings(
    found: Embedded, path: Path, origin: Origin, *, precision: str = "float32"
) -> list[Path]:
    """Write features with the names of their rows and their origin; return the files.

    `.safetensors`: `image_features` (n, d), `text_features` (m, d), `image_of_text` (m,),
    `image_ids` (n,), `keys` and `captions` as JSON in bytes (uint8), and the origin in its
    metadata. With the precision int8 or binary, features are as `codes.coded` says. `.npy`:
    NAME.images.npy and NAME.texts.npy with NAME.json. `.parquet`: one table, a row an image
    or a caption: kind, key, caption, features; the origin in its schema's metadata.

    Raises UserError where a file cannot be written.
    """
    check_suffix(path, precision)
    names = {"keys": found.keys, "captions": found.captions}
    if path.suffix == ".safetensors":
        encoded = {name: _as_bytes(rows) for name, rows in names.items()}
        with atomic_output(path) as temporary:
            _write_safetensors(found, temporary, encoded | coded(found, precision), origin)
        return [path]
    if path.suffix == ".parquet":
        with atomic_output(path) as temporary:
            _write_parquet(found, temporary, origin)
        return [path]
    images, texts, rows = (path.with_suffix(end) for end in (".images.npy", ".texts.npy", ".json"))
    for file, features in ((images, found.image_features), (texts, found.text_features)):
        with atomic_output(file) as temporary, temporary.open("wb") as opened:
            np.save(opened, features.numpy())
    content = {**origin, **names, "image_of_text": found.image_of_text.tolist()}
    with atomic_output(rows) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return [images, texts, rows]


def _as_bytes(rows: list[str]) -> Tensor:
    """Return names as JSON in bytes: a header of safetensors has room for 100 MB only.

    They are encoded in parts: the captions of a large split have gigabytes.
    """
    data = bytearray(b"[")
    for start in range(0, len(rows), _ROWS):
        part = json.dumps(rows[start : start + _ROWS])[1:-1]
        data += f"{', ' if start else ''}{part}".encode()
    data += b"]"
    return torch.frombuffer(data, dtype=torch.uint8)


def _write_safetensors(
    found: Embedded, path: Path, tensors: dict[str, Tensor], origin: Origin
) -> None:
    tensors |= {"image_of_text": found.image_of_text, "image_ids": found.image_ids}
    try:
        save_file(tensors, path, origin)
    except SafetensorError as error:  # it wraps the system's error
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(code, first_line(error)) from error


def _write_parquet(found: Embedded, path: Path, origin: Origin) -> None:
    import pyarrow
    from pyarrow import parquet

    def column(features: Tensor) -> pyarrow.Array:
        flat = pyarrow.array(features.numpy().ravel())
        return pyarrow.FixedSizeListArray.from_arrays(flat, features.shape[1])

    keys = [found.keys[row] for row in found.image_of_text.tolist()]
    parts = [
        pyarrow.table({"kind": [kind] * len(of), "key": of, "caption": said, "features": column(x)})
        for kind, of, said, x in (
            (
                "image",
                found.keys,
                pyarrow.nulls(len(found.keys), pyarrow.string()),
                found.image_features,
            ),
            ("text", keys, found.captions, found.text_features),
        )
    ]
    table = pyarrow.concat_tables(parts)
    parquet.write_table(table.replace_schema_metadata(origin), path)
