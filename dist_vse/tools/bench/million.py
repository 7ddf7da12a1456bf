"""`dist-vse bench million`: one exact step of a loss over a million pairs on two cores.

Features are made up: it is the loss that is measured, forward and backward. Afterwards a few rows
and columns are compared with a dense computation in float64.

b rows on this rank, N pairs, d embedding, W ranks, k rows or columns that are checked.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.files import check_output
from dist_vse.common.memory import measure
from dist_vse.common.terminal import say
from dist_vse.common.units import GIB
from dist_vse.distributed.spawn import run_on_ranks
from dist_vse.losses.global_loss import GlobalLoss, LossOutput
from dist_vse.losses.hardest import Hardest
from dist_vse.losses.matmul import Matmul
from dist_vse.losses.options import LossOptions
from dist_vse.losses.softmax import SharedSoftmax
from dist_vse.losses.tiled import TiledLoss
from dist_vse.losses.tiles import CPU_TILE, tile_shape
from dist_vse.tools.bench.checks import at_least_one
from dist_vse.tools.bench.report import describe_measurement, print_tables, write_report
from dist_vse.tools.bench.table import Table
from dist_vse.tools.bench.traffic import bytes_sent

TEMPERATURE, MARGIN = 0.1, 0.2
CHECKED = 4  # rows and columns a rank
BLOCK = 65_536  # columns of a float64 check at a time
SAMPLE_S = 1.0  # for the speed of bare products
PRODUCTS = {"convse": 4, "convse++": 1}
"""Products of N x b x d: similarities, again in backward, and two for the gradients; or one."""

FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "pairs": lambda row: f"{row['pairs']:,}",
    "seconds": lambda row: f"{row['seconds']:,.1f}",
    "CPU seconds": lambda row: f"{row['cpu_s']:,.1f}",
    "CPU seconds of the products alone": lambda row: f"{row['bound_s']:,.1f}",
    "times the products alone": lambda row: f"{row['cpu_s'] / row['bound_s']:.2f}",
    "TFLOP of a rank's products": lambda row: f"{row['flop'] / 1e12:,.2f}",
    "MiB that a rank sends": lambda row: f"{row['sent'] / 2**20:,.1f}",
    "GiB of a rank besides its features": lambda row: f"{row['memory_gib']:.3f}",
    "GiB of a whole process, its check included": lambda row: f"{row['process_gib']:.2f}",
    "error": lambda row: f"{row['error']:.1e}",
}
"""Rows of the table."""


def run(args: argparse.Namespace) -> int:
    """Measure every loss in processes of its own, print a table, write numbers; return 0.

    The file is written after every loss: one takes an hour.
    """
    _check(args)
    report: dict[str, Any] = describe_measurement("million", _words(args)) | {"rows": []}
    for number, loss in enumerate(args.losses, 1):
        rows = args.pairs // args.processes
        row = run_on_ranks(measure_loss, args.processes, rows, args.dim, loss)
        report["rows"].append(row)
        say(f"{loss}: {row['seconds']:,.1f} s")
        if args.out is not None:
            more = number < len(args.losses)
            write_report(args.out, report, [_table(report["rows"])], more_follows=more)
    print_tables([_table(report["rows"])])
    if args.out is not None:
        say(f"wrote {args.out}")
    return 0


def _check(args: argparse.Namespace) -> None:
    at_least_one(processes=args.processes, dim=args.dim)
    if args.pairs < CHECKED * args.processes or args.pairs % args.processes:
        raise UserError(
            f"--pairs ({args.pairs}) must be a multiple of --processes ({args.processes}), and at "
            f"least {CHECKED} a process"
        )
    if args.out is not None:
        check_output(args.out)


def _words(args: argparse.Namespace) -> list[str]:
    sizes = ["--pairs", args.pairs, "--dim", args.dim, "--processes", args.processes]
    return [*map(str, sizes), "--losses", *args.losses]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    first = rows[0]
    note = (
        f"d = {first['dim']}, {first['processes']} processes of one thread; the busiest or largest "
        "rank. Products alone: bare matrix products as large, by their speed in the same run. "
        "Other programs on the machine hardly change CPU seconds. Features of a rank take "
        f"{first['features_gib']:.3f} GiB. Error: of {2 * CHECKED * first['processes']} rows and "
        "columns, against dense float64."
    )
    table = Table("", ["one step", *(row["loss"] for row in rows)], note=note)
    for name, figure in FIGURES.items():
        table.add_row(name, *map(figure, rows))
    return table


def measure_loss(rows: int, dim: int, name: str) -> dict[str, Any]:
    """Measure a loss on `rows` pairs a rank; every rank calls this."""
    generator = torch.Generator().manual_seed(distributed.rank())
    images = functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)
    noise = torch.randn(rows, dim, generator=generator) / dim**0.5
    texts = functional.normalize(images + noise, dim=1)
    return _measure(name, images, texts)


class _Watched(GlobalLoss):
    """A loss whose tiled pass can be looked at afterwards."""

    tiled: TiledLoss

    def _build(self, *args: Any, **kwargs: Any) -> TiledLoss:
        self.tiled = super()._build(*args, **kwargs)
        return self.tiled


def _measure(name: str, images: Tensor, texts: Tensor) -> dict[str, Any]:
    """Take one step, and return its costs and its error."""
    log_scale = torch.tensor([1 / TEMPERATURE]).log()
    leaves = [x.clone().requires_grad_() for x in (images, texts)]
    loss = _Watched(name, LossOptions(margin=MARGIN, kernels="tiled"))
    outputs: list[LossOutput] = []

    def step() -> None:
        outputs.append(loss(leaves[0], leaves[1], log_scale, torch.zeros(1)))
        outputs[0].loss.backward()

    distributed.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    sent, allocated = measure(lambda: bytes_sent(step), images.device)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    total = len(images) * distributed.world_size()
    flop = PRODUCTS[name] * 2.0 * total * len(images) * images.shape[1]
    check = _check_softmax if name == "convse" else _check_hardest
    grads = [x.grad for x in leaves if x.grad is not None]
    error = max(check(loss.tiled, images, texts, grads[0]))
    most = torch.tensor([error, allocated.peak, seconds, cpu_s, _peak_rss()], dtype=torch.float64)
    error, peak, seconds, cpu_s, rss = distributed.all_reduce_max(most).tolist()
    return {
        "loss": name,
        "pairs": total,
        "dim": images.shape[1],
        "processes": distributed.world_size(),
        "loss_value": float(outputs[0].loss.detach()),
        "seconds": seconds,
        "cpu_s": cpu_s,
        "bound_s": flop / _product_speed(images, texts),
        "flop": flop,
        "sent": sent,
        "memory_gib": peak / GIB,
        "process_gib": rss / GIB,
        "features_gib": 2 * images.nbytes / GIB,
        "error": error,
    }


def _peak_rss() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _product_speed(images: Tensor, texts: Tensor) -> float:
    """Return the operations a CPU second of bare products, all ranks at work."""
    height, width = tile_shape(CPU_TILE, dense=True)
    matmul, columns = Matmul(images, bf16=False), texts[:width].contiguous()
    rows = slice(0, min(height, len(images)))
    matmul.similarities(rows, columns)
    distributed.barrier()
    count, start = 0, time.process_time()
    while time.process_time() - start < SAMPLE_S:
        matmul.similarities(rows, columns)
        count += 1
    spent = time.process_time() - start
    return count * 2.0 * rows.stop * len(columns) * images.shape[1] / spent


def _spots(count: int) -> Tensor:
    """Return the rows of this rank that are checked, from the first to the last."""
    return torch.linspace(0, count - 1, CHECKED).long()


def _of_columns(spots: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """Return every rank's spots among the columns, float64 (W k, d)."""
    return distributed.gather_rows(texts[spots].double())


def _error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def _check_softmax(tiled: TiledLoss, images: Tensor, texts: Tensor, grad: Tensor) -> list[float]:
    """Return the errors of log-sum-exps of rows and columns, and of the rows' gradients.

    The gradient of a row needs every column's sum: those are taken as found, since the same pass
    found the ones that are checked.
    """
    term = tiled.dense
    assert isinstance(term, SharedSoftmax)
    assert term.shift == 0
    spots, columns = _spots(len(images)), distributed.gather_rows(texts)
    weights = term.column_weights.double()  # one over the sum of a column's powers
    mine = images[spots].double()
    sums, expected = mine.new_zeros(len(spots)), torch.zeros_like(mine)
    row_weights = term.row_weights[spots].double()
    for start in range(0, len(columns), BLOCK):
        block = columns[start : start + BLOCK].double()
        powers = (mine @ block.T / TEMPERATURE).exp()
        sums += powers.sum(1)
        shares = powers * (row_weights.unsqueeze(1) + weights[start : start + BLOCK])
        expected += shares @ block
    expected -= 2 * texts[spots].double()
    # What a rank gets is W times the gradient of the mean over N rows.
    expected *= distributed.world_size() / (len(columns) * TEMPERATURE)
    spots_there = _of_columns(spots, images, texts)
    others = (spots_there @ images.double().T / TEMPERATURE).exp().sum(1)  # (W k,)
    distributed.all_reduce_sum(others)
    starts = torch.arange(distributed.world_size()).view(-1, 1) * len(images)
    return [
        _error(-row_weights.log(), sums.log()),
        _error(-weights[(starts + spots).flatten()].log(), others.log()),
        _error(grad[spots], expected),
    ]


def _check_hardest(tiled: TiledLoss, images: Tensor, texts: Tensor, grad: Tensor) -> list[float]:
    """Return the errors of hardest negatives of rows and columns, and of the rows' gradients."""
    term = tiled.sparse
    assert isinstance(term, Hardest)
    spots, columns = _spots(len(images)), distributed.gather_rows(texts)
    own = distributed.rank() * len(images) + spots
    mine = images[spots].double()
    hardest = mine.new_full((len(spots),), -2.0)
    for start in range(0, len(columns), BLOCK):
        s = mine @ columns[start : start + BLOCK].double().T
        inside = (own >= start) & (own < start + s.shape[1])
        s[inside, own[inside] - start] = -2.0
        hardest = torch.maximum(hardest, s.amax(1))
    there = _of_columns(spots, images, texts)
    s = there @ images.double().T  # (W k, b)
    first = distributed.rank() * len(spots)
    s[torch.arange(first, first + len(spots)), spots] = -2.0
    of_columns = distributed.all_reduce_max(s.amax(1))
    starts = torch.arange(distributed.world_size()).view(-1, 1) * len(images)
    places = (starts + spots).flatten()
    expected = torch.zeros_like(mine)
    for i, (spot, place) in enumerate(zip(spots.tolist(), own.tolist(), strict=True)):
        active = float(term.row_weight[spot])
        expected[i] += active * columns[int(term.rows.indices[spot])].double()
        chosen = (term.columns.indices == place) & (term.column_weight > 0)
        expected[i] += columns[chosen].double().sum(0)
        expected[i] -= (active + float(term.column_weight[place])) * texts[spot].double()
    expected *= distributed.world_size() / (len(columns) * TEMPERATURE)
    return [
        _error(term.rows.values[spots], hardest),
        _error(term.columns.values[places], of_columns),
        _error(grad[spots], expected),
    ]
