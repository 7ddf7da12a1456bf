"""Run OpenCLIP's trainer and ours, end to end, on the same shards and model.

Both run as their users run them, under torchrun: from tars to updated weights, in processes of one
thread. The trainings take turns over the rounds. docs/explain/peers.md says what is held equal.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.result import Result
from benchmarks.support.max_batch import Largest, largest_batch
from benchmarks.support.model_size import model_sizes
from benchmarks.support.open_clip_pipeline import require_peer
from benchmarks.support.step_errors import step_errors
from benchmarks.support.trainer_data import CONTEXT, HEAD_WIDTH, SHARDS, Model, write_data
from benchmarks.support.trainers import OURS, PEER, STREAMS, Setting, Task, train
from dist_vse.common.errors import UserError
from dist_vse.common.units import GIB
from dist_vse.distributed.spawn import run_on_ranks
from dist_vse.tools.bench.table import Table

MEMORY_STEPS = 2  # the second one meets the optimizer's states


def run(args: argparse.Namespace) -> Result:
    """Measure what `args` ask for; each training's speed is printed when it ends."""
    _check(args)
    require_peer()
    tables = []
    model = Model(args.image, args.size, args.text_width, args.text_depth, args.dim)
    with tempfile.TemporaryDirectory() as name:
        setting = Setting(Path(name), model, args.processes, args.workers, args.timeout)
        write_data(setting.folder, model, args.photographs)
        report: dict[str, Any] = {
            "options": {k: v for k, v in vars(args).items() if isinstance(v, str | int | float)},
            "tokens": CONTEXT,
            "models": model_sizes(setting),
        }
        tables.append(_models_table(report["models"]))
        if args.rounds:
            report["speed"] = _measure_speed(setting, args)
            errors = run_on_ranks(step_errors, args.processes, args.chunks)
            report["gradient_errors"] = errors
            tables.append(_speed_table(report["speed"], errors, args))
        if args.max_ratio:
            report["largest"] = _measure_largest(setting, args)
            tables.append(_largest_table(report["largest"], args))
    return Result(report, tables)


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for options that make no sense, before anything is measured."""
    for name in ("processes", "chunks", "steps", "warm_up", "chunk"):
        if getattr(args, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} ({getattr(args, name)}) must be at least 1")
    for name in ("workers", "rounds", "max_ratio"):
        if getattr(args, name) < 0:
            raise UserError(
                f"--{name.replace('_', '-')} ({getattr(args, name)}) must be at least 0"
            )
    unit = args.processes * args.chunks * STREAMS
    if args.batch < 1 or args.batch % unit:
        raise UserError(
            f"--batch ({args.batch}) must be a multiple of --processes ({args.processes}) times "
            f"--chunks ({args.chunks}) times {STREAMS} = {unit}"
        )
    readers = args.processes * max(1, args.workers)
    if SHARDS % readers:
        raise UserError(f"--processes times --workers ({readers}) must divide {SHARDS}")
    if args.photographs < SHARDS or args.photographs % SHARDS:
        raise UserError(f"--photographs ({args.photographs}) must be a multiple of {SHARDS}")
    if args.text_width % HEAD_WIDTH:
        raise UserError(f"--text-width ({args.text_width}) must be a multiple of {HEAD_WIDTH}")


def _tasks(args: argparse.Namespace) -> dict[str, Task]:
    """Return the trainings by the name of their row."""
    steps = args.warm_up + args.steps
    k, half = args.chunks, args.chunks // 2
    return {
        "OpenCLIP": Task(PEER, args.batch, 1, steps),
        "dist_vse": Task(OURS, args.batch, 1, steps),
        f"OpenCLIP, accum_freq {k}": Task(PEER, args.batch, k, steps),
        f"dist_vse, {k} chunks, no graph kept": Task(OURS, args.batch, k, steps, 0),
        f"dist_vse, {k} chunks, one kept (default)": Task(OURS, args.batch, k, steps, 1),
        f"dist_vse, {k} chunks, half kept": Task(OURS, args.batch, k, steps, half),
        f"dist_vse, {k} chunks, keep_graphs auto": Task(OURS, args.batch, k, steps, "auto"),
    }


def _measure_speed(setting: Setting, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row a training: its seconds a step, by round, and its peaks of memory.

    Each one is printed when it ends: all of them take minutes.
    """
    tasks = _tasks(args)
    rows: dict[str, dict[str, Any]] = {
        name: {"case": name, "trainer": task.trainer, "chunks": task.chunks, "seconds": []}
        for name, task in tasks.items()
    }
    for _ in range(args.rounds):
        for name, task in tasks.items():
            training = train(setting, task)
            row = rows[name]
            row["seconds"].append(training.seconds_a_step(args.warm_up))
            print(f"{name}: {row['seconds'][-1]:.2f} s a step", flush=True)
            for kind in ("rank_bytes", "worker_bytes"):
                row[kind] = max(row.get(kind, 0), getattr(training, kind))
    return list(rows.values())


def _measure_largest(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Search the largest batches: OpenCLIP's without accumulation, with it, and ours.

    The last two are tried up to `--max-ratio` times the first: time ends the search, not memory.
    """
    limit = int(args.limit_gib * GIB)
    unit = args.processes * args.chunk

    def search(trainer: str, first: int, *, chunk: int | None, max_batch: int | None) -> Largest:
        def peak(batch: int) -> int:
            chunks = 1 if chunk is None else batch // args.processes // chunk
            return train(setting, Task(trainer, batch, chunks, MEMORY_STEPS)).rank_bytes

        found = largest_batch(peak, limit=limit, first=first, unit=unit, max_batch=max_batch)
        if found is None:
            raise UserError(f"--limit-gib ({args.limit_gib}) holds no batch of {trainer}; raise it")
        return found

    plain = search(PEER, 4 * unit, chunk=None, max_batch=None)
    max_batch = args.max_ratio * plain.batch
    found = {"OpenCLIP": plain}
    for trainer, name in ((PEER, "OpenCLIP, accum_freq"), (OURS, "dist_vse")):
        half = max(unit, max_batch // 2 // unit * unit)
        found[f"{name}, {args.chunk} pairs at a time"] = search(
            trainer, half, chunk=args.chunk, max_batch=max_batch
        )
    return {name: vars(largest) for name, largest in found.items()}


def _models_table(sizes: dict[str, dict[str, int]]) -> Table:
    table = Table("the two models", ("trainer", "parameters", "MFLOP a pair forward"))
    for name, size in sizes.items():
        table.add_row(name, f"{size['parameters']:,}", f"{size['forward_flops'] / 1e6:,.1f}")
    return table


def _speed_table(
    rows: list[dict[str, Any]], errors: dict[str, Any], args: argparse.Namespace
) -> Table:
    columns = ("pairs/s", "x OpenCLIP", "a rank's peak", "a worker's")
    table = Table(
        f"global batch {args.batch}, {args.processes} processes, {args.workers} workers each",
        ("case", *columns, "gradient: towers", "temperature"),
    )
    seconds = {row["case"]: statistics.median(row["seconds"]) for row in rows}
    for row in rows:
        peer = next(r for r in rows if r["trainer"] == PEER and r["chunks"] == row["chunks"])
        parts = errors[f"{row['trainer']} {row['chunks']}"]
        table.add_row(
            row["case"],
            f"{args.batch / seconds[row['case']]:,.1f}",
            f"{seconds[peer['case']] / seconds[row['case']]:.2f}",
            *(f"{row[kind] / 2**20:,.0f} MiB" for kind in ("rank_bytes", "worker_bytes")),
            *(f"x {p['factor']:.4f}, error {p['error']:.0e}" for p in parts.values()),
        )
    return table


def _largest_table(found: dict[str, Any], args: argparse.Namespace) -> Table:
    table = Table(
        f"largest global batch tried within {args.limit_gib:g} GiB a process",
        ("trainer", "global batch", "x OpenCLIP", "a rank's peak", "by the line"),
    )
    for name, row in found.items():
        table.add_row(
            name,
            f"{row['batch']:,}",
            f"{row['batch'] / found['OpenCLIP']['batch']:.1f}",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            f"{row['by_line']:,}",
        )
    return table
