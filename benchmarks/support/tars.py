"""WebDataset tars that both pipelines read, of any shard sizes, with our index beside them."""

import argparse
import contextlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_vse.data.index import Index, read_index
from dist_vse.shards import cli as shards


def write_tars(
    folder: Path, samples: Iterator[tuple[bytes, str]], extension: str, sizes: Sequence[int]
) -> Index:
    """Write (image file, caption) pairs as tars of `sizes` samples, and index them."""
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for _ in range(size):
                image, caption = next(samples)
                for suffix, content in ((extension, image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
    parser = argparse.ArgumentParser()
    shards.add_arguments(parser)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        shards.run(parser.parse_args(["index", str(folder)]))
    return read_index(folder)
