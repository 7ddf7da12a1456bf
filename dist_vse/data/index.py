"""The index of a sharded data set: the contract between the sharding tool and the stream.

A data set is a folder with `index.json`, its tar shards, and beside each tar a side file of
sample offsets (`train-00000.tar` has `train-00000.npy`): an int64 array (samples, 5), one row a
sample in the tar's order, with the columns of `OFFSET_COLUMNS`. Bytes are counted from the
start of the tar, so that a sample is two reads and no tar header is parsed.

Existing tars stay where they are (`dist-vse shard index`). Their shards name `side`: the base name
of two side files, `SIDE.npy` and `SIDE.jsonl`. The second holds the samples' JSON, and the meta
columns are offsets into it instead of the tar.
"""

import difflib
import hashlib
import re
import struct
import sys
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vse.common.errors import UserError
from dist_vse.common.files import atomic_write, write_json
from dist_vse.common.reading import MAX_LINE_BYTES, BadFileError, is_count, read_array, read_json

if TYPE_CHECKING:
    import numpy as np  # not here: sharding does without it
    from numpy.typing import NDArray

INDEX_NAME = "index.json"
FORMAT = 1
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Allowed image formats, by Pillow's names. EPS is not among them: decoding it runs code."""
PLAIN_SCHEMES = frozenset(
    (
        *("http", "https", "file", "ftp", "ftps", "sftp", "scp", "memory", "webdav"),
        *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "ais", "htgs"),
        *("hdfs", "webhdfs", "oss", "oci", "tos", "dbfs"),
    )
)
"""Schemes of URLs that are only read. All others (`pipe:`, `reference:` …) may run code."""
_LOOKED_AT = 1000  # entries of a folder, to say what it is
_PACKED = frozenset((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))
_SOURCES = {  # by what INPUT is called
    "parquet": frozenset((".parquet",)),
    "jsonl": frozenset((".jsonl",)),
    "csv": frozenset((".csv",)),
    "tsv": frozenset((".tsv",)),
    "folder": frozenset((".jpg", ".jpeg", ".png", ".webp")),
}
OFFSET_COLUMNS = ("image_offset", "image_bytes", "meta_offset", "meta_bytes", "image_id")


@dataclass(frozen=True)
class Shard:
    """One tar."""

    path: str  # relative to the index's folder, or a URL
    num_samples: int
    num_bytes: int  # size of the tar
    sha256: str  # of the tar
    side: str = ""  # base name of the side files of a tar that was only indexed

    @property
    def offsets_name(self) -> str:
        """Name of the side file of offsets."""
        return f"{self.side}.npy" if self.side else offsets_name(self.path)

    @property
    def meta_name(self) -> str | None:
        """Name of the file that holds the samples' JSON; None where the tar itself does."""
        return f"{self.side}.jsonl" if self.side else None


@dataclass(frozen=True)
class Split:
    """The shards of one split, in their fixed order."""

    shards: list[Shard] = field(default_factory=list)
    num_captions: int = 0

    @property
    def num_samples(self) -> int:
        """Images in the split."""
        return sum(shard.num_samples for shard in self.shards)


@dataclass(frozen=True)
class Index:
    """A data set's splits; `root` is the folder that relative shard paths start from."""

    root: Path
    splits: dict[str, Split]
    allow_pipe: bool = False
    """Whether the user lets commands among the shards' paths run."""

    def split(self, name: str) -> Split:
        """Return the split called `name`.

        Raises UserError if there is none, if it has no samples, or if a shard of it would run a
        command without the user's consent.
        """
        if name not in self.splits:
            near = difflib.get_close_matches(name, self.splits, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(sorted(self.splits)) or "none"
            raise UserError(
                f"{self.root / INDEX_NAME}: no split {name!r} (splits: {known}){hint}; name one of "
                "them (data.train_split, data.eval_split, --split)"
            )
        if self.splits[name].num_samples == 0:
            raise UserError(
                f"{self.root / INDEX_NAME}: split {name!r} is empty; shard samples to it"
            )
        for shard in self.splits[name].shards:
            check_consent(shard.path, allow_pipe=self.allow_pipe)
        return self.splits[name]

    def offsets(self, shard: Shard) -> "NDArray[np.int64]":
        """Read the shard's side file: int64 (samples, 5), columns as in `OFFSET_COLUMNS`.

        Raises UserError if the file is missing, broken or disagrees with the index.
        """
        import numpy as np

        path = self.root / shard.offsets_name
        if not path.is_file():
            raise UserError(f"{path}: is missing (offsets of {shard.path}); run `dist-vse shard`")
        try:
            table: NDArray[np.int64] = read_array(path)
        except BadFileError as error:
            raise UserError(
                f"{path}: is cut or no NumPy file ({error}); run `dist-vse shard` again"
            ) from error
        if table.shape != (shard.num_samples, len(OFFSET_COLUMNS)):
            raise UserError(
                f"{path}: has shape {table.shape}, but the index says {shard.num_samples} samples; "
                "run `dist-vse shard` again"
            )
        if table.dtype != np.int64 or not _inside(table, shard):
            raise UserError(
                f"{path}: places a sample outside of {shard.path}; run `dist-vse shard` again"
            )
        return table

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when any shard's bytes do."""
        digests = [s.sha256 for name in sorted(self.splits) for s in self.splits[name].shards]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def _inside(table: "NDArray[np.int64]", shard: Shard) -> bool:
    """Return whether all places are possible: a stranger's file may hold any number."""
    ends = (shard.num_bytes, MAX_LINE_BYTES if shard.side else shard.num_bytes)
    for column, end in zip((0, 2), ends, strict=True):
        offsets, sizes = table[:, column], table[:, column + 1]
        if (offsets < 0).any() or (sizes < 0).any() or (sizes > end).any():
            return False
        if not (column and shard.side) and (offsets > end - sizes).any():
            return False
    return True


def offsets_name(shard_path: str) -> str:
    """Name of the side file of a shard: the tar's base name with `.npy`."""
    return Path(shard_path).name.removesuffix(".tar") + ".npy"


def write_offsets(path: Path, rows: Iterable[tuple[int, ...]]) -> None:
    """Write a side file by one rename: NumPy's format, version 1.0, of int64 (samples, 5).

    Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    values = array("q", chain.from_iterable(rows))
    if sys.byteorder == "big":
        values.byteswap()
    shape = (len(values) // len(OFFSET_COLUMNS), len(OFFSET_COLUMNS))
    fields = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}"
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + f"{fields:<117}\n".encode())
        values.tofile(file)


def is_remote(path: str) -> bool:
    """Return whether a shard's path is a URL or a `pipe:` command."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path) is not None


def may_run_code(location: str) -> bool:
    """Return whether opening a path may run code: a command, or a chain of fsspec's openers."""
    scheme = location.partition(":")[0].lower()
    chained = "::" in re.sub(r"\[[^]]*\]", "", location)  # but for an IPv6 address
    return is_remote(location) and (scheme not in PLAIN_SCHEMES or chained)


def check_consent(location: str, *, allow_pipe: bool) -> None:
    """Raise UserError if opening a location may run code, and the user hasn't consented.

    `location` may come from a file of somebody else: it never consents by itself.
    """
    if may_run_code(location) and not allow_pipe:
        raise UserError(
            f"{location}: opening it may run a command; if you trust who wrote it, allow that with "
            "--allow-pipe, in training with data.allow_pipe=true"
        )


def image_id(identity: str | bytes | memoryview) -> int:
    """Hash what identifies an image (or a caption) to a signed 64-bit id.

    Pairs with equal ids are no negatives of each other. Among a billion images, the chance that any
    two ids collide is about 3 %, and a collision only removes one pair from the negatives. XXH3
    (https://xxhash.com) is not cryptographic, but ten times as fast as SHA-256.
    """
    import xxhash  # here, so that `dist-vse --help` works without it

    data = identity.encode() if isinstance(identity, str) else identity
    digest = xxhash.xxh3_64_digest(data)
    return int.from_bytes(digest, "little", signed=True)


def write_index(index: Index) -> Path:
    """Write `index.json` into the index's root by one rename; return its path."""
    path = index.root / INDEX_NAME
    splits = {name: asdict(split) for name, split in sorted(index.splits.items())}
    for name, split in index.splits.items():
        splits[name]["num_samples"] = split.num_samples
        splits[name]["shards"] = [
            {key: value for key, value in shard.items() if value != ""}
            for shard in splits[name]["shards"]
        ]
    write_json(path, {"format": FORMAT, "splits": splits}, indent=1, sort_keys=True)
    return path


def read_index(location: str | Path, *, allow_pipe: bool = False) -> Index:
    """Read the index of a data set's folder (or the `index.json` itself).

    `allow_pipe` is the user's consent to run the commands that it names as shards.

    Raises UserError if it is missing, no JSON, or of another format.
    """
    path = Path(location)
    path = path / INDEX_NAME if path.name != INDEX_NAME else path
    if not path.is_file():
        given = str(location)
        place = given if is_remote(given) or Path(given).is_file() else str(path)
        raise UserError(f"{place}: no such index; {_remedy(given)}")
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise UserError(f"{path}: format {content['format']}, but this version reads {FORMAT}")
        splits = {name: _split(split) for name, split in content["splits"].items()}
    except (BadFileError, LookupError, TypeError, AttributeError) as error:
        hint = "make it with `dist-vse shard`"
        raise UserError(f"{path}: not a dist_vse index ({error}); {hint}") from error
    return Index(path.parent, splits, allow_pipe)


def _remedy(given: str) -> str:
    """Return how to get an index of what was given instead of one."""
    folder, name = Path(given), given.lower()
    inside = sorted(folder.iterdir())[:_LOOKED_AT] if folder.is_dir() else []
    ends = {name[name.find(".tar") :] if ".tar" in name else Path(name).suffix}
    ends |= {"".join(Path(child.name.lower()).suffixes[-2:]) for child in inside}
    ends |= {Path(child.name.lower()).suffix for child in inside}
    if ".tar" in ends or name.startswith("pipe:"):
        return f"index the tars once with `dist-vse shard index '{given}' --out DIR`; give DIR"
    if ends & _PACKED:
        return f"unpack the tars, or `dist-vse shard reshard '{given}' OUT`; give OUT"
    for source, of_source in _SOURCES.items():
        if ends & of_source:
            return f"make one with `dist-vse shard {source} '{given}' OUT`; give OUT"
    if is_remote(given):
        return "it must lie on this machine, though its shards may be URLs; copy its folder here"
    return "make one with `dist-vse shard`, and give its OUT"


def _split(fields: dict[str, Any]) -> Split:
    """Return the split of these fields; raises TypeError for one of another type."""
    if not is_count(fields["num_captions"]):
        raise TypeError(f"num_captions is {fields['num_captions']!r}")
    return Split([_shard(**shard) for shard in fields["shards"]], fields["num_captions"])


def _shard(**fields: Any) -> Shard:
    """Return the shard of these fields; raises TypeError for one of another type."""
    shard = Shard(**fields)
    for name, value in vars(shard).items():
        wanted = int if name.startswith("num_") else str
        if type(value) is not wanted or (wanted is int and not is_count(value)):
            raise TypeError(f"{name} is {value!r}")
    return shard
