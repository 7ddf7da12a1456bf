"""Read finished shards back: every sample's bytes, in the tar's order."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.reading import parse_json
from dist_vse.data.index import Index, Shard, is_remote
from dist_vse.shards.remote import local_copy


@dataclass(frozen=True, slots=True)
class Stored:
    """One sample as it lies in a shard."""

    image: bytes
    meta: bytes  # JSON
    image_id: int

    def caption_list(self) -> list[str]:
        """Return the captions; raises ValueError, TypeError or KeyError for broken JSON."""
        captions = parse_json(self.meta, dict)["captions"]
        if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise TypeError("captions are no list of strings")
        return captions

    def key(self) -> str:
        """Return the key; raises ValueError, TypeError or KeyError for broken JSON."""
        return str(parse_json(self.meta, dict)["key"])


@contextmanager
def local_tar(index: Index, shard: Shard) -> Iterator[Path]:
    """Yield a local path of the shard's tar; a remote one is copied for the block.

    Raises UserError if a remote one cannot be read.
    """
    location = shard.path if is_remote(shard.path) else str(index.root / shard.path)
    folder = Path(tempfile.gettempdir())
    with local_copy(location, folder, allow_pipe=index.allow_pipe) as path:
        yield path


def read_stored(index: Index, shard: Shard, tar: Path) -> Iterator[Stored]:
    """Yield the samples of a shard whose tar lies at `tar`; cut ones have fewer bytes.

    Raises UserError if the tar or a side file is missing, or disagrees with the index.
    """
    meta_path = index.root / shard.meta_name if shard.meta_name else tar
    for path in (tar, meta_path):
        if not path.is_file():
            raise UserError(f"{path}: is missing; `dist-vse shard repair {index.root}` may fix it")
    with tar.open("rb") as images, meta_path.open("rb") as metas:
        for image_at, image_bytes, meta_at, meta_bytes, identity in index.offsets(shard).tolist():
            yield Stored(
                os.pread(images.fileno(), image_bytes, image_at),
                os.pread(metas.fileno(), meta_bytes, meta_at),
                identity,
            )
