"""Checks 3 and 4: what the ranks send each other arrives, and how fast."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.tools.plan.calibrate import measure_link

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32)
FLAGS = 50


def check_collectives(task: Task) -> Finding:
    """Try every collective with every dtype that is sent, and ragged rows; time a flag."""
    wrong, count = [], 0
    for name, found, right in _collectives():
        count += 1
        if found.dtype != right.dtype or not torch.equal(found.cpu(), right):
            wrong.append(name)
    rank = distributed.rank()
    objects = distributed.all_gather_object({"rank": rank})
    if [each["rank"] for each in objects] != list(range(distributed.world_size())):
        wrong.append("objects")
    flag_us = _flag_us()
    wrong = sorted({name for names in distributed.all_gather_object(wrong) for name in names})
    size = distributed.world_size()
    figures = {"ranks": size, "collectives": count + 1, "flag_us": flag_us, "wrong": wrong}
    if wrong:
        return Finding(False, f"wrong on {size} ranks: {', '.join(wrong)}", figures)
    words = f"{count + 1} on {size} ranks give what they should; a flag takes {flag_us:.0f} us"
    return Finding(True, words, figures)


def _collectives() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each collective's name, its result here, and what that must be."""
    here, rank, size = distributed.device(), distributed.rank(), distributed.world_size()
    every = torch.arange(1, size + 1)
    for dtype in DTYPES:
        own = torch.full((4,), rank + 1, device=here, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        gathered = every.repeat_interleave(4).to(dtype)
        yield f"gather {name}", distributed.gather_rows(own), gathered
        pending = distributed.AsyncAllGather(own.view(2, 2))
        yield f"async gather {name}", pending.wait().flatten(), gathered
        for reduce, right in (
            (distributed.all_reduce_sum, int(every.sum())),
            (distributed.all_reduce_max, size),
            (distributed.all_reduce_min, 1),
        ):
            filled = torch.full((4,), right, dtype=dtype)
            yield f"{reduce.__name__} {name}", reduce(own.clone()), filled
        whole = torch.arange(2 * size, device=here, dtype=dtype)
        part = (2 * rank + torch.arange(2)).to(dtype) * size
        yield f"reduce_scatter {name}", distributed.reduce_scatter_rows(whole), part
    before, after = (rank - 1) % size, (rank + 1) % size
    if size > 1:
        swap = distributed.AsyncSendRecv(
            torch.full((3,), float(rank), device=here),
            torch.empty(3, device=here),
            destination=after,
            source=before,
        )
        yield "exchange", swap.wait(), torch.full((3,), float(before))
        total = torch.ones(3, device=here)
        distributed.AsyncReduce(total, owner=size - 1).wait()
        if rank == size - 1:
            yield "reduce to an owner", total, torch.full((3,), float(size))
    ragged = distributed.all_gather_rows(torch.arange(rank + 1, device=here))
    yield "ragged gather", ragged, torch.cat([torch.arange(n + 1) for n in range(size)])
    on_host = distributed.gather_rows(torch.tensor([rank]))
    yield "gather in host memory", on_host, torch.arange(size)


def _flag_us() -> float:
    """Return what a decision that all ranks take alike costs."""
    distributed.any_rank(False)
    started = time.perf_counter()
    for _ in range(FLAGS):
        distributed.any_rank(False)
    return (time.perf_counter() - started) / FLAGS * 1e6


def check_bandwidth(task: Task) -> Finding:
    """Measure what a rank sends a second, in gathers, reductions and to its neighbour."""
    link = measure_link(rounds=5)
    words = (
        f"GB/s a rank: gather {link['copy_gb_per_s']:.1f}, reduce {link['reduce_gb_per_s']:.1f}, "
        f"neighbour {link['pair_gb_per_s']:.1f}; a small message {link['alpha_us']:.0f} us"
    )
    return Finding(True, words, {"ranks": distributed.world_size(), **link})
