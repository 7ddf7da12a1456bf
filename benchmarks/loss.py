"""Time the losses over the global batch, and OpenCLIP's loss, on this machine.

Every case runs in the same processes, in turn, so that a slow moment of the machine meets all;
a time is the slowest rank's, and the median over the repeats. b rows on a rank, N on all,
d embedding.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.result import Result
from benchmarks.support.loss_on_gpu import run_on_gpu
from benchmarks.support.lower_bound import bare_steps
from benchmarks.support.memory import measure_memory
from benchmarks.support.open_clip_loss import peer_loss
from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.units import GIB
from dist_vse.distributed.spawn import run_on_ranks
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.losses.global_loss import global_loss
from dist_vse.losses.options import LossOptions
from dist_vse.tools.bench.checks import at_least_one
from dist_vse.tools.bench.table import Table
from dist_vse.tools.bench.traffic import bytes_sent

Step = Callable[[], Any]
TEMPERATURE = 0.1
KEPT_MIB = 64  # of tiles, in the case between none and all
EXACT_ROWS = 512  # of a rank, for the error compared with float64


def run(args: argparse.Namespace) -> Result:
    """Measure what `args` ask for."""
    _check(args)
    if args.device == "cuda":
        return run_on_gpu(args.rows, args.dim, args.repeats)
    report: dict[str, Any] = {
        "processes": args.processes,
        "threads_per_process": 1,
        "embedding": args.dim,
        "speed": [],
        "memory": [],
    }
    for rows in args.rows:
        result = run_on_ranks(_measure_speed, args.processes, rows, args.dim, args.repeats)
        report["speed"].append(result)
    for total in args.memory:
        for name in ("convse", "convse++", "OpenCLIP"):
            result = measure_memory(name, total, args.memory_dim, args.processes)
            if result is not None:
                report["memory"].append(result)
    tables = [_speed_table(speed) for speed in report["speed"]]
    return Result(report, tables + [_memory_table(report["memory"])] * bool(report["memory"]))


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for options that make no sense, before anything is measured."""
    at_least_one(processes=args.processes, dim=args.dim, repeats=args.repeats)
    for rows in args.rows:
        at_least_one(rows=rows)
    at_least_one(memory_dim=args.memory_dim)
    for total in args.memory:
        if total < args.processes or total % args.processes:
            near = max(1, total // args.processes) * args.processes
            raise UserError(
                f"--memory ({total}) must be a multiple of --processes ({args.processes}); "
                f"nearest: {near}"
            )


def make_features(rows: int, width: int) -> list[Tensor]:
    """Return image and caption features (b, d) of this rank; a caption resembles its image."""
    generator = torch.Generator().manual_seed(distributed.rank())
    images = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)
    noise = torch.randn(rows, width, generator=generator) * (3 / width**0.5)
    texts = torch.nn.functional.normalize(images + noise, dim=1)
    return [images.requires_grad_(), texts.requires_grad_()]


def differentiate(features: list[Tensor], name: str, **options: Any) -> list[Tensor]:
    """Run one loss forward and backward; return it and the features' gradients."""
    log_scale = torch.tensor([TEMPERATURE]).log().neg()
    chosen = LossOptions(**options)
    loss = global_loss(name, features[0], features[1], log_scale, torch.zeros(1), chosen).loss
    return [loss.detach(), *torch.autograd.grad(loss, features)]


def _measure_speed(rows: int, width: int, repeats: int) -> dict[str, Any]:
    features = make_features(rows, width)
    everything = rows * rows * distributed.world_size() * 4 / GIB
    options: dict[str, dict[str, Any]] = {
        "convse": {"name": "convse", "memory_gib": 0},
        f"convse, {KEPT_MIB} MiB kept": {"name": "convse", "memory_gib": KEPT_MIB / 1024},
        "convse, S kept": {"name": "convse", "memory_gib": everything},
        "convse, ring": {"name": "convse", "memory_gib": 0, "transport": "ring"},
        "convse, bf16": {"name": "convse", "memory_gib": 0, "bf16_products": True},
        "convse++": {"name": "convse++"},
        "convse++, bf16": {"name": "convse++", "bf16_products": True},
    }
    steps: dict[str, Step] = {
        case: partial(differentiate, features, **chosen) for case, chosen in options.items()
    }
    steps |= bare_steps(*(x.detach() for x in features))
    peer = peer_loss()
    if peer is not None:
        steps["OpenCLIP"] = lambda: torch.autograd.grad(peer(*features, 1 / TEMPERATURE), features)
    times: dict[str, list[float]] = {case: [] for case in steps}
    for case in list(steps) + list(steps) * repeats:  # the first round only warms up
        times[case].append(_time(steps[case]))
    return {
        "rows_per_rank": rows,
        "global_batch": rows * distributed.world_size(),
        "embedding": width,
        "repeats": repeats,
        "seconds": {case: statistics.median(taken[1:]) for case, taken in times.items()},
        "sent_bytes": {
            case: bytes_sent(step) for case, step in steps.items() if not case.startswith("bare")
        },
        "error": _errors([x.detach()[:EXACT_ROWS] for x in features], options),
    }


def _time(step: Step) -> float:
    """Return the seconds that the slowest rank takes."""
    distributed.barrier()
    started = time.perf_counter()
    step()
    taken = torch.tensor([time.perf_counter() - started])
    return float(distributed.all_reduce_max(taken))


def _errors(features: list[Tensor], options: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return each case's gradient error (norm over norm) on a part of the batch, in float64."""
    world_size = distributed.world_size()
    whole = [distributed.gather_rows(x).double().requires_grad_() for x in features]
    log_scale = torch.tensor([TEMPERATURE], dtype=torch.float64).log().neg()
    errors = {}
    in_precision: dict[str, tuple[dict[str, Any], torch.dtype]] = {
        case: (chosen, torch.float32) for case, chosen in options.items()
    }
    for precision in (torch.bfloat16, torch.float16):
        label = str(precision).removeprefix("torch.")
        for name in ("convse", "convse++"):
            in_precision[f"{name}, {label} features"] = {"name": name}, precision
    for case, (chosen, precision) in in_precision.items():
        loss = dense_loss(chosen["name"], whole[0], whole[1], log_scale, torch.zeros(1).double())
        exact = torch.autograd.grad(loss, whole)
        leaves = [x.to(precision, copy=True).requires_grad_() for x in features]
        ours = [x.float() for x in differentiate(leaves, **chosen)[1:]]
        errors[case] = max(
            float((distributed.gather_rows(a) / world_size - b).norm() / b.norm())
            for a, b in zip(ours, exact, strict=True)
        )
    return errors


def _speed_table(result: dict[str, Any]) -> Table:
    seconds, sent, error = result["seconds"], result["sent_bytes"], result["error"]
    table = Table(
        f"forward and backward, {result['rows_per_rank']} rows a rank, "
        f"N = {result['global_batch']}, d = {result['embedding']}",
        ("case", "ms", "x OpenCLIP", "/ limit", "MiB sent", "error"),
    )
    peer = seconds.get("OpenCLIP")
    for case in dict.fromkeys([*seconds, *error]):
        taken, limit = seconds.get(case), _limit(case, result)
        table.add_row(
            case,
            f"{taken * 1e3:.0f}" if taken else "",
            f"{peer / taken:.2f}" if peer and taken and not case.startswith("bare") else "",
            f"{taken / limit:.2f}" if taken and limit else "",
            f"{sent[case] / 2**20:.1f}" if case in sent else "",
            f"{error[case]:.0e}" if case in error else "",
        )
    telemetry = seconds["bare telemetry"] / seconds["convse"]
    whole = seconds["bare product, torch.mm"] + seconds["bare collectives"]
    table.note = (
        "limit: the bare float32 products of the case, in tiles that nobody looks at, and its bare "
        f"collectives; convse++ takes {seconds['convse++'] / whole:.2f} of its product as one "
        "torch.mm and the collectives; error: of the gradient, compared with float64; "
        f"telemetry takes {telemetry:.1%} of convse"
    )
    return table


def _limit(case: str, result: dict[str, Any]) -> float | None:
    """Return the seconds of the products and collectives that a case cannot do without."""
    similarities = result["rows_per_rank"] * result["global_batch"] * 4
    kept = {
        "convse": 0.0,
        "convse, ring": 0.0,
        f"convse, {KEPT_MIB} MiB kept": min(1.0, KEPT_MIB * 2**20 / similarities),
        "convse, S kept": 1.0,
    }
    seconds = result["seconds"]
    if case == "convse++":
        return float(seconds["bare product"] + seconds["bare collectives"])
    if case not in kept:
        return None
    four, three = seconds["bare 4 products"], seconds["bare 3 products, S kept"]
    return float(four + (three - four) * kept[case] + seconds["bare collectives"])


def _memory_table(results: list[dict[str, Any]]) -> Table:
    columns = ("loss", "N", "peak MiB", "of it not features, MiB", "s")
    table = Table(f"peak memory of a rank, d = {results[0]['embedding']}", columns)
    for result in results:
        own = result["own_bytes"]
        table.add_row(
            result["loss"],
            str(result["global_batch"]),
            f"{result['peak_bytes'] / 2**20:.1f}",
            "" if own is None else f"{own / 2**20:.2f}",
            f"{result['seconds']:.1f}",
        )
    return table
