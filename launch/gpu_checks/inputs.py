"""Check 10: whether the workers bring pairs as fast as the GPU takes them."""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.data.streams import open_train_sets
from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.launch.gpu_checks.workload import reference_config
from dist_vse.runs.checkpoint import Progress
from dist_vse.runs.trained import run_tokenizer
from dist_vse.shards import cli as shards
from dist_vse.training.batches import build_train_batches

PHOTOGRAPHS = 2048
HEIGHT, WIDTH, QUALITY = 480, 640, 90
BATCH = 512  # pairs that are asked for at a time
SECONDS, SPARE_S = 15.0, 10.0  # of measuring, and of the limit for what comes after it
SPARE = 1.2  # times the step's need


def check_input(task: Task) -> Finding:
    """Measure the run's stream alone, and the copy to the GPU; compare with check 9's rate."""
    config = _config(task)
    workers = max(1, config.data.num_workers)
    rate = _rate(config, Path(task.folder), ends=task.ends - SPARE_S)
    pin_s, copy_s = _copies(config)
    need = task.earlier_figure(9, "pairs_per_s")
    figures: dict[str, Any] = {
        "pairs_per_s": rate,
        "workers": workers,
        "pairs_per_s_of_a_worker": rate / workers,
        "pin_s": pin_s,
        "copy_s": copy_s,
        "needed_pairs_per_s": need,
    }
    words = (
        f"{rate:,.0f} pairs/s from {workers} workers; {BATCH} images: pinned in {pin_s * 1e3:.0f} "
        f"ms, copied in {copy_s * 1e3:.1f} ms"
    )
    if need is None:
        return Finding(True, f"{words}; check 9 says what a step needs", figures)
    figures["ratio"] = rate / need
    if rate >= SPARE * need:
        return Finding(True, f"{words}; a step takes {need:,.0f}", figures)
    wanted = -(-SPARE * need * workers // rate)
    words += f"; a step takes {need:,.0f}: data.num_workers={wanted:.0f} would do"
    return Finding(False, words, figures)


def _config(task: Task) -> TrainConfig:
    """Return the run's config if it has data, else the reference with made-up photographs."""
    config = reference_config(task)
    if config.data.index:
        return config
    index = make_photographs(Path(task.folder), PHOTOGRAPHS)
    # A rank's share of the cores: every GPU of the machine will want its own.
    workers = max(1, len(os.sched_getaffinity(0)) // torch.cuda.device_count() - 2)
    data = replace(config.data, index=str(index), num_workers=workers, num_streams=workers * 4)
    return replace(config, data=data)


def make_photographs(folder: Path, count: int) -> Path:
    """Write JPEG files of smooth noise, with the edges of photographs, and shard them."""
    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir()
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            coarse = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
            pixels = coarse.repeat(16, 0).repeat(16, 1) // 2
            pixels += rng.integers(0, 16, pixels.shape, dtype=np.uint8)
            name = f"images/{number:05d}.jpg"
            (folder / name).write_bytes(simplejpeg.encode_jpeg(pixels, quality=QUALITY))
            line = {"image": name, "captions": [f"squares, number {number}"], "split": "train"}
            file.write(json.dumps(line) + "\n")
    parser = argparse.ArgumentParser()
    shards.add_arguments(parser)
    out = folder / "shards"
    shards.run(parser.parse_args(["jsonl", str(folder / "pairs.jsonl"), str(out)]))
    return out


def _rate(config: TrainConfig, folder: Path, *, ends: float) -> float:
    """Return the pairs a second of the training stream, its first batch left out."""
    sets = open_train_sets(config.data)
    tokenizer = run_tokenizer(config, folder, build=True)
    streams = config.data.num_streams
    batch = max(streams, BATCH // streams * streams)
    small = replace(config, global_batch_size=batch * distributed.world_size(), chunk_size=batch)
    batches = build_train_batches(small, sets, tokenizer, Progress(0, 0, []))
    next(batches)
    count, began = 0, time.monotonic()
    while not count or time.monotonic() < min(began + SECONDS, ends):
        count += len(next(batches).images)
    return count / (time.monotonic() - began)


def _copies(config: TrainConfig) -> tuple[float, float]:
    """Return the seconds to pin a batch's images, and to copy them to the GPU."""
    size = config.model.image.size
    images = torch.zeros(BATCH, 3, size, size, dtype=torch.uint8)
    started = time.perf_counter()
    pinned = images.pin_memory()
    pin_s = time.perf_counter() - started
    target = torch.empty_like(images, device=distributed.device())
    target.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    target.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize()
    return pin_s, time.perf_counter() - started
