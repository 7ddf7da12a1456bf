"""Time the commands that read many or large files, with their peak memory.

The inputs are made in a folder first: runs, a file of metrics, embeddings, small shards. Every
command is a process of its own; the memory is the most that it, or a child of it, had resident.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import import_path
from benchmarks.result import Result
from dist_vse.common.errors import UserError
from dist_vse.config import DataConfig, TrainConfig, dump_config
from dist_vse.tools.bench.table import Table

MB = 1e6
CAPTIONS = 5
_STARTER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
_CLI = "import sys; from dist_vse.cli import main; sys.exit(main())"


def run(args: argparse.Namespace) -> Result:
    """Make the inputs that are not there yet, and time the commands.

    Raises UserError for a command that fails.
    """
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    table = Table("large inputs", ["command", "seconds", "peak memory, MB"])
    for name, command in _commands(args, folder):
        seconds, peak = _measure(name, command)
        table.add_row(name, f"{seconds:.1f}", f"{peak / MB:,.0f}")
    return Result({"rows": table.rows}, [table])


def _commands(args: argparse.Namespace, folder: Path) -> Iterable[tuple[str, list[str]]]:
    """Yield the commands with a name each, once their inputs are there."""
    ours = [sys.executable, "-c", _CLI]
    if args.runs:
        runs = folder / f"runs-{args.runs}"
        if not runs.exists():
            write_runs(runs, args.runs)
        yield f"runs: {args.runs:,} runs", [*ours, "runs", str(runs)]
    if args.metrics_mib:
        run_dir = folder / f"metrics-{args.metrics_mib}"
        if not run_dir.exists():
            write_metrics(run_dir, args.metrics_mib << 20)
        page = str(folder / "report.html")
        yield (
            f"report: metrics of {args.metrics_mib:,} MiB",
            [*ours, "report", str(run_dir), "--out", page],
        )
        yield f"runs: metrics of {args.metrics_mib:,} MiB", [*ours, "runs", str(run_dir)]
    if args.captions:
        file, numbers = str(folder / "embeddings.safetensors"), [str(args.captions), str(args.dim)]
        for what in ("write", "search"):
            script = [sys.executable, "-m", "benchmarks.support.embeddings", what, file, *numbers]
            yield f"embeddings: {what} {args.captions:,} captions of {args.dim}", script
    if args.shards:
        data = folder / f"shards-{args.shards}"
        if not data.exists():
            pairs = folder / "pairs.jsonl"
            write_pairs(pairs, args.shards * args.samples)
            options = ["--shard-size", str(args.samples)]
            _measure("shard", [*ours, "shard", "jsonl", str(pairs), str(data), *options])
        for what in ("stats", "verify"):
            yield f"shard {what}: {args.shards:,} shards", [*ours, "shard", what, str(data)]


def write_runs(folder: Path, count: int) -> None:
    """Write runs of a sweep over four settings, each with a few lines of metrics."""
    text = dump_config(TrainConfig(output_dir=str(folder / "run-000000"), total_steps=1000))
    for number in range(count):
        run_dir = folder / f"run-{number:06d}"
        (run_dir / "submit").mkdir(parents=True)
        own = text.replace("run-000000", run_dir.name).replace(
            "seed: 0\n", f"seed: {number % 100}\n"
        )
        (run_dir / "config.yaml").write_text(own)
        write_lines(run_dir / "metrics.jsonl", 20)
        logs = str(run_dir / "submit" / "log_RANK_log.err")
        job = {"job_id": "4000000", "scheduler": "local", "logs": logs, "num_ranks": 1}
        job["host"] = os.uname().nodename
        (run_dir / "submit" / "job.json").write_text(json.dumps(job))
        Path(logs.replace("RANK_log.err", "0_result.json")).write_text('{"code": 0, "error": ""}\n')


def write_metrics(run_dir: Path, num_bytes: int) -> None:
    """Write a run whose metrics have some number of bytes."""
    run_dir.mkdir(parents=True)
    config = TrainConfig(output_dir=str(run_dir), data=DataConfig(index=str(run_dir / "gone")))
    (run_dir / "config.yaml").write_text(dump_config(config))
    write_lines(run_dir / "metrics.jsonl", 1 << 62, num_bytes)


def write_lines(path: Path, steps: int, num_bytes: int = 1 << 62) -> None:
    """Write a training's lines, an evaluation every ten thousand steps, up to a size."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for step in range(steps):
            if written >= num_bytes:
                break
            if step % 10_000 == 0:
                written += file.write(json.dumps(_evaluation(step)) + "\n")
            written += file.write(json.dumps(_step(step + 1)) + "\n")


def _step(step: int) -> dict[str, object]:
    numbers = {"loss": 5 / step**0.3, "lr": 1e-3, "pairs_per_s": 1500.0 + step % 7}
    shares = {name: 0.1 for name in ("forward_s", "loss_s", "backward_s", "wait_s", "copy_s")}
    more = {"memory_gib": 1.25, "temperature": 0.0712345678, "positive_similarity": 0.512345678}
    return {"kind": "train", "step": step, "samples_seen": 64 * step, **numbers, **shares, **more}


def _evaluation(step: int) -> dict[str, object]:
    recalls = {f"{way}_r{k}": 50.0 for way in ("i2t", "t2i") for k in (1, 5, 10)}
    recalls |= {"i2t_medr": 1.0, "t2i_medr": 1.0, "rsum": 300.0}
    counts = {"samples_seen": 64 * step, "num_images": 1000, "num_texts": 5000}
    return {"kind": "eval", "step": step, "split": "val", **counts, **recalls}


def write_pairs(path: Path, count: int) -> None:
    """Write a list of tiny images, which differ, and the images."""
    images = path.with_suffix("")
    images.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            name = images / f"{number:07d}.png"
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (4, 4, 3), np.uint8)).save(buffer, "PNG")
            name.write_bytes(buffer.getvalue())
            captions = [f"picture {number} in words, number {i}" for i in range(CAPTIONS)]
            file.write(json.dumps({"image": str(name), "captions": captions}) + "\n")


def _measure(name: str, command: list[str]) -> tuple[float, int]:
    """Return a command's seconds and peak memory in bytes.

    A small process starts it: Linux counts what the starter had resident as the command's.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-S", "-c", _STARTER, *command],
        capture_output=True,
        env={**os.environ, **import_path(), "COLUMNS": "200"},
    )
    if done.returncode != 0:
        raise UserError(f"{name}: code {done.returncode}: {done.stderr.decode()[-2000:]}")
    return time.perf_counter() - start, int(done.stdout) << 10
