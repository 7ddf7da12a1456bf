"""Count what an epoch misses and repeats, here and with OpenCLIP; measure a worker's memory.

20 shards of 300 to 700 samples are read by W ranks with some workers each. Ours must show every
sample once, in the same global batches whoever reads; OpenCLIP's pipeline is counted as it is,
and with --dataset-resampled.
"""

import argparse
import hashlib
import io
import multiprocessing
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.result import Result
from benchmarks.support.open_clip_pipeline import peer_loader, require_peer
from benchmarks.support.tars import write_tars
from dist_vse.config import DataConfig, ImageConfig
from dist_vse.data.index import Index, Split
from dist_vse.data.samples import Batch, Placement
from dist_vse.data.streams import TrainSet
from dist_vse.data.train_stream import train_batches
from dist_vse.models.tokenizer import WordTokenizer
from dist_vse.tools.bench.table import Table

SHARDS, MIN_SIZE, MAX_SIZE = 20, 300, 700
BATCH, STREAMS = 240, 24  # both multiples of every W times workers


def run(args: argparse.Namespace) -> Result:
    """Count what `args` ask for."""
    require_peer()
    report: dict[str, Any] = {"rows": []}
    sizes = np.random.default_rng(0).integers(MIN_SIZE, MAX_SIZE + 1, SHARDS).tolist()
    with tempfile.TemporaryDirectory() as folder:
        index = write_tars(Path(folder), _numbered(sum(sizes)), "png", sizes)
        batches = set()
        for world_size in args.ranks:
            for workers in args.workers:
                missed, repeated, digest = count_ours(index, world_size, workers)
                batches.add(digest)
                row = {"ranks": world_size, "workers": workers, "ours": [missed, repeated]}
                for name, resampled in (("OpenCLIP", False), ("resampled", True)):
                    row[name] = _count_peer(index, world_size, workers, resampled)
                report["rows"].append(row)
        report |= {"samples": sum(sizes), "different_orders": len(batches)}
        tables = [_table(report)]
        if args.memory_samples:
            report["memory"] = worker_memory(index, args.memory_samples)
            title = f"a worker's memory over {args.memory_samples:,} samples, by tenths"
            tables.append(Table(title, ("tenth", "MiB")))
            for tenth, number in enumerate(report["memory"], 1):
                tables[-1].add_row(str(tenth), f"{number / 2**20:.0f}")
    return Result(report, tables)


def count_ours(index: Index, world_size: int, workers: int) -> tuple[int, int, str]:
    """Return the samples of the first epoch missed and repeated, and a hash of all batches."""
    streams = [_stream(index, rank, world_size, workers) for rank in range(world_size)]
    return count(streams, index.split("train").num_samples)


def count(streams: Sequence[Iterator[Batch]], total: int) -> tuple[int, int, str]:
    """Return the same for the ranks' streams of an epoch of `total` samples, and close them."""
    seen: Counter[int] = Counter()
    digests = [hashlib.sha256() for _ in range(4)]  # of pixels, ids, ids and origins
    for _ in range(total // BATCH + 2):
        for stream in streams:
            batch = next(stream)
            seen.update(number for turn, number in batch.origin.tolist() if turn == 0)
            of_rows = batch.images, batch.image_ids, batch.text_ids, batch.origin
            for rows, digest in zip(of_rows, digests, strict=True):
                digest.update(rows.contiguous().numpy().tobytes())
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    whole = "".join(digest.hexdigest() for digest in digests)
    return total - len(seen), sum(seen.values()) - len(seen), whole


def _stream(index: Index, rank: int, world_size: int, workers: int) -> Iterator[Batch]:
    return train_batches(
        [TrainSet(index, "train")],
        WordTokenizer(["number"], 4),
        DataConfig(
            num_streams=STREAMS,
            shuffle_window=256,
            num_workers=workers,
            flip=True,
            color_jitter=0.2,
        ),
        ImageConfig(size=8),
        seed=0,
        global_batch_size=BATCH,
        placement=Placement(rank, world_size),
    )


def _count_peer(index: Index, world_size: int, workers: int, resampled: bool) -> list[int]:
    """Return the samples that one epoch of all ranks misses and repeats."""
    total = index.split("train").num_samples
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        data = peer_loader(
            [str(index.root / shard.path) for shard in index.split("train").shards],
            transform=_nothing,
            tokenizer=_number,
            batch_size=BATCH // world_size,
            num_workers=workers,
            num_samples=total,
            resampled=resampled,
            rank=rank,
            world_size=world_size,
        )
        for _, numbers in data.dataloader:
            seen.update(int(number) for number in numbers)
    return [total - len(seen), sum(seen.values()) - len(seen)]


def _nothing(image: Any) -> int:
    return 0


def _number(text: str) -> list[int]:
    return [int(text.split()[1])]


def _numbered(count: int) -> Iterator[tuple[bytes, str]]:
    """Yield tiny images, each with a caption of its own."""
    for number in range(count):
        pixels = np.random.default_rng(number % 97).integers(0, 256, (12, 12, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        yield buffer.getvalue(), f"number {number}"


def worker_memory(index: Index, num_samples: int) -> list[int]:
    """Return the bytes that a worker holds for itself after each tenth of an epoch."""
    split = index.split("train")
    times = -(-num_samples // split.num_samples)
    large = replace(index, splits={"train": Split(list(split.shards) * times, 0)})
    before = set(multiprocessing.active_children())
    stream = _stream(large, 0, 1, 1)
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - before
    found = []
    for _ in range(10):
        for _ in range(num_samples // BATCH // 10):
            next(stream)
        status = Path(f"/proc/{worker.pid}/status").read_text()
        found.append(int(re.findall(r"RssAnon:\s+(\d+)", status)[0]) * 1024)
    stream.close()  # type: ignore[attr-defined]
    return found


def _table(report: dict[str, Any]) -> Table:
    total = report["samples"]
    table = Table(
        f"one epoch of {total:,} samples in {SHARDS} shards: unseen / repeated",
        ("ranks", "workers", "ours", "OpenCLIP", "OpenCLIP, resampled"),
        note=f"ours: {report['different_orders']} order of global batches in "
        f"{len(report['rows'])} runs",
    )
    for row in report["rows"]:
        shares = [
            " / ".join(f"{100 * number / total:.1f} %" for number in row[name])
            for name in ("OpenCLIP", "resampled")
        ]
        ours = " / ".join(map(str, row["ours"]))
        table.add_row(str(row["ranks"]), str(row["workers"]), ours, *shares)
    return table
