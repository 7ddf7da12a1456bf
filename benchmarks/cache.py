"""Time a step with gradient caching, one without, and the peers' steps.

Every case runs in the same processes, in turn, so that a slow moment of the machine meets all; a
time is the slowest rank's, and the median over the repeats. K chunks a rank.
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.result import Result
from benchmarks.support.cache_memory import measure_memory, memory_table
from benchmarks.support.cache_peers import Step, check_checkout, grad_cache_step, open_clip_step
from benchmarks.support.workload import Workload, make_model, make_optimizer, make_pairs
from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import EngineConfig
from dist_vse.distributed.spawn import run_on_ranks
from dist_vse.engine.zero import ZeroEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.tools.bench.checks import at_least_one
from dist_vse.tools.bench.table import Table
from dist_vse.training.grad_cache import train_step

WHOLE, WHOLE_FROZEN = "uncached", "frozen image trunk, uncached"
OPEN_CLIP, GRAD_CACHE = "OpenCLIP, accum_freq", "GradCache library"


def run(args: argparse.Namespace) -> Result:
    """Measure what `args` ask for."""
    _check(args)
    load = Workload(args.image, args.size, args.text_width, args.text_depth, args.tokens, args.dim)
    report: dict[str, Any] = {
        "processes": args.processes,
        "threads_per_process": 1,
        "workload": vars(load) | {"parameters": _size(load)},
    }
    tables = []
    if args.repeats:
        report["speed"] = run_on_ranks(_measure, args.processes, load, args)
        tables.append(_table(report["speed"]))
    if args.memory:
        report["memory"] = [
            run_on_ranks(measure_memory, 1, load, n, args.chunk) for n in args.memory
        ]
        tables.append(memory_table(report["memory"]))
    return Result(report, tables)


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for options that make no sense, before anything is measured."""
    at_least_one(processes=args.processes, chunks=args.chunks, chunk=args.chunk)
    if args.repeats < 0:
        raise UserError(f"--repeats ({args.repeats}) must be at least 0")
    unit = args.processes * args.chunks
    if args.batch < 1 or args.batch % unit:
        raise UserError(
            f"--batch ({args.batch}) must be a multiple of --processes ({args.processes}) times "
            f"--chunks ({args.chunks}) = {unit}"
        )
    if args.grad_cache is not None:
        check_checkout(args.grad_cache)


def _size(load: Workload) -> dict[str, int]:
    model = make_model(load)
    parts = {"image": model.image, "text": model.text}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def _measure(load: Workload, args: argparse.Namespace) -> dict[str, Any]:
    rows, chunks = args.batch // distributed.world_size(), args.chunks
    pairs = make_pairs(load, rows)
    ours = partial(_our_step, load, pairs)
    steps: dict[str, Step | None] = {
        WHOLE: ours(1, 1),
        "no graph kept": ours(chunks, 0),
        "one graph kept": ours(chunks, 1),
        "half of the graphs kept": ours(chunks, chunks // 2),
        WHOLE_FROZEN: ours(1, 1, frozen_image=True),
        "frozen image trunk, no graph kept": ours(chunks, 0, frozen_image=True),
        "frozen image trunk, half kept": ours(chunks, chunks // 2, frozen_image=True),
        "frozen image trunk, all kept": ours(chunks, chunks, frozen_image=True),
    }
    model = make_model(load)
    steps[OPEN_CLIP] = open_clip_step(model, make_optimizer(model), pairs, chunks)
    if args.grad_cache is not None:
        model = make_model(load)
        model.requires_grad_(True)
        steps[GRAD_CACHE] = grad_cache_step(
            args.grad_cache, model, make_optimizer(model), pairs, chunks
        )
    return {
        "global_batch": args.batch,
        "chunks": chunks,
        "repeats": args.repeats,
        "seconds": _median_seconds({k: step for k, step in steps.items() if step}, args.repeats),
    }


def _median_seconds(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Return each case's seconds, by round; the first round, which warms up, is left out."""
    times: dict[str, list[float]] = {case: [] for case in steps}
    for case in list(steps) * (repeats + 1):
        distributed.barrier()
        started = time.perf_counter()
        steps[case]()
        taken = torch.tensor([time.perf_counter() - started])
        times[case].append(float(distributed.all_reduce_max(taken)))
    return {case: taken[1:] for case, taken in times.items()}


def _our_step(
    load: Workload,
    pairs: tuple[Tensor, Tensor],
    num_chunks: int,
    keep_graphs: int,
    *,
    frozen_image: bool = False,
) -> Step:
    model = make_model(load, frozen_image=frozen_image)
    engine = ZeroEngine(model, make_optimizer(model), EngineConfig(), rank_batch_size=len(pairs[0]))

    def step() -> None:
        images, tokens = (x.chunk(num_chunks) for x in pairs)
        chunks = [model.prepare(images=i, tokens=t) for i, t in zip(images, tokens, strict=True)]
        train_step(engine, GlobalLoss("info_nce"), chunks, keep_graphs=keep_graphs)

    return step


def _table(result: dict[str, Any]) -> Table:
    seconds = {case: statistics.median(taken) for case, taken in result["seconds"].items()}
    table = Table(
        f"a step, global batch {result['global_batch']}, K = {result['chunks']} chunks",
        ("case", "s", "/ uncached", "x OpenCLIP", "x GradCache"),
    )
    for case, taken in seconds.items():
        frozen = case.startswith("frozen")
        whole = seconds[WHOLE_FROZEN if frozen else WHOLE]
        peers = [None if frozen else seconds.get(peer) for peer in (OPEN_CLIP, GRAD_CACHE)]
        table.add_row(
            case,
            f"{taken:.2f}",
            f"{taken / whole:.3f}",
            *(f"{peer / taken:.2f}" if peer else "" for peer in peers),
        )
    return table
