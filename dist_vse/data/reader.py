"""Read single samples from tar shards by the index's offsets."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_vse.common.errors import UserError
from dist_vse.common.reading import parse_json
from dist_vse.common.terminal import without_secrets
from dist_vse.data.decode import BadSampleError
from dist_vse.data.index import Index, Shard, is_remote
from dist_vse.data.sample_fields import OPTIONAL_FIELDS, caption_weights, negatives
from dist_vse.data.shard_cache import Cache, cache_from_environment, fetch, open_copy

_MORE = frozenset(("languages", *OPTIONAL_FIELDS))


@dataclass(frozen=True)
class Meta:
    """The fields of a sample's JSON that training uses."""

    key: str
    captions: tuple[str, ...]  # at least one, none of them blank
    labels: tuple[str, ...] = ()  # `languages`: one a caption, or none at all
    weights: tuple[float, ...] = ()  # `caption_weights`: likewise
    negatives: tuple[str, ...] = ()  # none of them blank


class _OpenShard:
    """A shard's files and its table of offsets."""

    def __init__(self, index: Index, shard: Shard, cache: Cache) -> None:
        self.table: NDArray[np.int64] = index.offsets(shard)
        if is_remote(shard.path):
            self.path, self.file = open_copy(shard, cache)
        else:
            self.path = index.root / shard.path
            self.file = _open(self.path)
        self.meta_file = self.file
        num_bytes = os.fstat(self.file).st_size
        if num_bytes != shard.num_bytes:
            self.close()
            raise UserError(
                f"{self.path}: the shard has {num_bytes} bytes, but the index says "
                f"{shard.num_bytes}; copy it again, or run `dist-vse shard` again"
            )
        # The samples' JSON is in the tar, or beside the index if the tar is not ours.
        self.meta_path = self.path
        if shard.meta_name:
            self.meta_path = index.root / shard.meta_name
            self.meta_file = _open(self.meta_path)

    def image(self, row: int) -> bytes:
        return _read(self.file, self.path, int(self.table[row, 0]), int(self.table[row, 1]))

    def meta(self, row: int) -> bytes:
        offset, num_bytes = int(self.table[row, 2]), int(self.table[row, 3])
        return _read(self.meta_file, self.meta_path, offset, num_bytes)

    def close(self) -> None:
        for file in {self.file, self.meta_file}:
            os.close(file)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(
            f"{path}: the shard is missing; copy it there, or run `dist-vse shard` again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: the shard cannot be opened ({error.strerror})") from error


def _read(file: int, path: Path, offset: int, num_bytes: int) -> bytes:
    data = os.pread(file, num_bytes, offset)
    if len(data) != num_bytes:
        raise UserError(
            f"{path}: ends before byte {offset + num_bytes}, where the index has a sample; "
            "run `dist-vse shard` again"
        )
    return data


class ShardReader:
    """Reads the samples of one split; keeps the `max_open` most recently used shards open."""

    def __init__(self, index: Index, split: str, *, max_open: int) -> None:
        self._index = index
        self._shards: Sequence[Shard] = index.split(split).shards
        self._first = [0, *accumulate(shard.num_samples for shard in self._shards)]
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._cache = cache_from_environment(allow_pipe=index.allow_pipe)
        self.is_remote = any(is_remote(shard.path) for shard in self._shards)

    def prefetch(self, shard: int) -> None:
        """Copy a remote shard to the local disk unless it is there."""
        if is_remote(self._shards[shard].path):
            fetch(self._shards[shard], self._cache)

    def shard_name(self, shard: int) -> str:
        """Return the shard's path for a message: as in the index, without secrets."""
        return without_secrets(self._shards[shard].path)

    def number(self, shard: int, row: int) -> int:
        """Return the sample's number in the split, in the order of the index."""
        return self._first[shard] + row

    def place(self, number: int) -> tuple[int, int]:
        """Return the (shard number, row) of a sample's number in the split."""
        shard = bisect_right(self._first, number) - 1
        return shard, number - self._first[shard]

    def image(self, shard: int, row: int) -> bytes:
        """Read the bytes of the sample's image file."""
        return self._opened(shard).image(row)

    def image_id(self, shard: int, row: int) -> int:
        """Return the sample's image id, from the side file."""
        return int(self._opened(shard).table[row, 4])

    def meta(self, shard: int, row: int) -> Meta:
        """Read the sample's key and captions.

        Raises BadSampleError if its JSON is broken or holds no caption.
        """
        return parse_meta(self._meta_bytes(shard, row))

    def key(self, shard: int, row: int) -> str:
        """Read the sample's key; return the row instead if its JSON is broken."""
        try:
            return str(parse_json(self._meta_bytes(shard, row), dict)["key"])
        except (ValueError, KeyError):
            return f"row {row}"

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def _meta_bytes(self, shard: int, row: int) -> bytes:
        return self._opened(shard).meta(row)

    def _opened(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= self._max_open:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = _OpenShard(self._index, self._shards[shard], self._cache)
        return self._open[shard]


def parse_meta(data: bytes) -> Meta:
    """Parse a sample's JSON; blank captions are left out.

    Raises BadSampleError if it is no such JSON, or has no caption.
    """
    try:
        content = parse_json(data, dict)
        key, captions = content["key"], content["captions"]
        if not isinstance(captions, list):  # a text would be taken letter by letter
            raise TypeError(f"captions are a {type(captions).__name__}, not a list")
        kept = tuple(caption for caption in captions if caption.strip())
        "".join((str(key), *kept)).encode()  # half of a pair of surrogates is no text
        if kept and not _MORE.intersection(content):
            return Meta(str(key), kept)
        chosen = [bool(caption.strip()) for caption in captions]
        languages = content.get("languages")
        labels = compress(map(str, languages if isinstance(languages, list) else ()), chosen)
        given = caption_weights(content, len(captions))
        weights, names = tuple(compress(given, chosen)), tuple(labels)
        false = negatives(content)
        "".join(false).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadSampleError(f"broken metadata ({type(error).__name__}: {error})") from error
    if not kept:
        raise BadSampleError("no caption")
    return Meta(str(key), kept, names if len(names) == len(kept) else (), weights, false)
