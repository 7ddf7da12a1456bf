"""Measure decoded, augmented, tokenised pairs a second, and those of OpenCLIP's pipeline.

Both read the same tars, crop alike and split words by our tokenizer (OpenCLIP's own is slower);
ours yields uint8 (the model normalises on its device), OpenCLIP's float32. The pipelines run in
turn, in rounds, and the bare loop "decode scaled, resize" on the same cores stands for what no
pipeline can beat.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import simplejpeg
import torch

from benchmarks.result import Result
from benchmarks.support.open_clip_pipeline import peer_loader, require_peer
from benchmarks.support.photos import SUBJECTS, photographs
from benchmarks.support.tars import write_tars
from dist_vse.config import DataConfig, ImageConfig
from dist_vse.data.decode import Transform, decode_image, random_box
from dist_vse.data.index import Index
from dist_vse.data.reader import ShardReader
from dist_vse.data.streams import TrainSet
from dist_vse.data.train_stream import train_batches
from dist_vse.models.tokenizer import WordTokenizer, build_vocabulary
from dist_vse.tools.bench.table import Table

SIZE = 224
SHARDS = 4
CONTEXT = 77  # tokens, as CLIP's
PEER_BUFFER = 200  # samples; OpenCLIP's own 5,000 would take the whole measurement to fill
IDLE_S = 0.2  # seconds in which idle workers use no processor
BATCHES_AHEAD = 4  # a worker: more than either pipeline makes ahead
Batches = Iterator[Any]


def run(args: argparse.Namespace) -> Result:
    """Measure what `args` ask for."""
    require_peer()
    torch.set_num_threads(1)  # the trainer's; the workers have one anyway
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = [args.photographs // SHARDS] * SHARDS
        index = write_tars(folder, photographs(sum(sizes)), "jpg", sizes)
        images = _images(index)
        report: dict[str, Any] = {
            "photographs": len(images),
            "mean_kilobytes": sum(map(len, images)) / len(images) / 1000,
            "min_crop_area": args.min_crop_area,
            "difference": _difference(images[:64], args.min_crop_area),
            "rates": [],
        }
        for workers in args.workers:
            rates = _measure(index, images, workers, args)
            report["rates"].append({"workers": workers, **rates})
    return Result(report, [_table(report)])


def _measure(
    index: Index, images: list[bytes], workers: int, args: argparse.Namespace
) -> dict[str, float]:
    """Return images a second, the median of the rounds, of each pipeline."""
    ours, peer = (start(index, workers, args) for start in (_ours, _peer))
    rounds: dict[str, Callable[[], float]] = {
        "ours": lambda: _rate(ours, workers, args),
        "OpenCLIP": lambda: _rate(peer, workers, args),
        "bare loop": lambda: _bare_rate(images, workers, args),
    }
    for batches in (ours, peer):
        next(batches)  # all processes are started now
    rates: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(args.repeats):
        for name, measure in rounds.items():
            _wait_until_idle()
            rates[name].append(measure())
    ours.close()  # type: ignore[attr-defined]
    return {name: statistics.median(values) for name, values in rates.items()}


def _ours(index: Index, workers: int, args: argparse.Namespace) -> Batches:
    return train_batches(
        [TrainSet(index, "train")],
        _words(),
        DataConfig(
            num_streams=2 * workers,
            num_workers=workers,
            min_crop_area=args.min_crop_area,
        ),
        ImageConfig(size=SIZE),
        seed=0,
        global_batch_size=args.batch_size,
    )


def _peer(index: Index, workers: int, args: argparse.Namespace) -> Batches:
    import open_clip

    transform = open_clip.image_transform(
        SIZE, is_train=True, aug_cfg={"scale": (args.min_crop_area, 1.0)}
    )
    data = peer_loader(
        [str(index.root / shard.path) for shard in index.split("train").shards],
        transform=transform,
        tokenizer=_PaddedTokenizer(),
        batch_size=args.batch_size,
        num_workers=workers,
        buffer=PEER_BUFFER,
    )
    return iter(data.dataloader)


def _words() -> WordTokenizer:
    return WordTokenizer(build_vocabulary(SUBJECTS.values(), 1), CONTEXT)


class _PaddedTokenizer:
    """Ours as OpenCLIP's pipeline calls it: a caption at a time, all rows of one length."""

    def __init__(self) -> None:
        self._tokenize = _words()

    def __call__(self, caption: str) -> torch.Tensor:
        rows = self._tokenize([caption])
        return torch.nn.functional.pad(rows, (0, CONTEXT - rows.shape[1]))


def _rate(batches: Batches, workers: int, args: argparse.Namespace) -> float:
    """Return images a second, after what was made ahead of time is taken."""
    for _ in range(BATCHES_AHEAD * workers):
        next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < args.seconds:
        next(batches)
        count += args.batch_size
    return count / (time.perf_counter() - started)


def _wait_until_idle() -> None:
    """Wait while workers of the pipeline measured before still make batches ahead."""
    workers = psutil.Process().children(recursive=True)

    def busy() -> float:
        return sum(sum(worker.cpu_times()[:2]) for worker in workers)

    before = busy()
    while True:
        time.sleep(IDLE_S)
        now = busy()
        if now - before < IDLE_S / 10:
            return
        before = now


def _bare_rate(images: list[bytes], processes: int, args: argparse.Namespace) -> float:
    """Return images a second of as many processes that do nothing but decode and resize."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        work = [(images, args.min_crop_area, args.seconds)] * processes
        return sum(pool.starmap(_bare_loop, work, chunksize=1))


def _bare_loop(images: list[bytes], min_crop_area: float, seconds: float) -> float:
    rng = np.random.default_rng(0)
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    crops = []
    for data in images:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        box = random_box(width, height, min_crop_area, rng)
        scale = 2 if min(box[2] - box[0], box[3] - box[1]) >= 2 * SIZE else 1
        crops.append((height // scale, width // scale, *(round(edge / scale) for edge in box)))
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for data, (height, width, left, top, right, bottom) in zip(images, crops, strict=True):
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
            cv2.resize(pixels[top:bottom, left:right], (SIZE, SIZE), dst=out)
        count += len(images)
    return count / (time.perf_counter() - started)


def _images(index: Index) -> list[bytes]:
    reader = ShardReader(index, "train", max_open=2)
    return [reader.image(*reader.place(n)) for n in range(index.split("train").num_samples)]


def _difference(images: list[bytes], min_crop_area: float) -> float:
    """Return the mean absolute difference to the full, antialiased decode, in % of the range."""
    found = []
    for number, data in enumerate(images):
        fast, full = (
            decode_image(
                data,
                Transform(SIZE, True, min_crop_area, scaled=scaled),
                np.random.default_rng(number),
            ).astype(float)
            for scaled in (True, False)
        )
        found.append(np.abs(fast - full).mean() / 2.55)
    return float(np.mean(found))


def _table(report: dict[str, Any]) -> Table:
    columns = "workers", "ours, a second", "OpenCLIP", "ratio", "bare loop, as many processes"
    table = Table(
        f"{report['photographs']} photographs of 640x480, "
        f"{report['mean_kilobytes']:.0f} KB, crops of {report['min_crop_area']:.0%} and more; "
        f"pixels {report['difference']:.2f} % from the full decode",
        (*columns, "share of it"),
    )
    for rates in report["rates"]:
        table.add_row(
            str(rates["workers"]),
            f"{rates['ours']:,.0f}",
            f"{rates['OpenCLIP']:,.0f}",
            f"{rates['ours'] / rates['OpenCLIP']:.2f}",
            f"{rates['bare loop']:,.0f}",
            f"{rates['ours'] / rates['bare loop']:.0%}",
        )
    return table
