"""What every process of `dist-vse bench scale` does: train some steps of each case, and measure.

The engine is built again for each round of a case, so that only one is in memory at a time, and
warmed up.
"""

import gc
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import BrokenBarrierError
from typing import Any

import torch

from dist_vse import distributed
from dist_vse.common import step_timer
from dist_vse.common.errors import UserError
from dist_vse.config import TrainConfig
from dist_vse.runs.metrics import synchronize
from dist_vse.tools.bench.scale_cases import Case
from dist_vse.tools.bench.scale_harness import StepHarness, build_harness
from dist_vse.tools.bench.scale_memory import measure_memory, memory_parts
from dist_vse.tools.bench.traffic import bytes_sent_by_part
from dist_vse.training.flops import Flops, peak_flops


@dataclass(frozen=True)
class Budget:
    """How much is measured."""

    rounds: int
    steps: int
    """Timed steps of a round."""
    stream: bool
    """Read the config's data, not made-up pairs."""


@dataclass(frozen=True)
class RoundRobin:
    """Lets groups of processes work one after another; a waiting one leaves the cores to others."""

    barrier: Any  # of multiprocessing, for the processes of all groups
    index: int
    count: int

    def rounds(self, count: int) -> Iterator[int]:
        """Yield the number of each round when it is this group's turn."""
        for number in range(count):
            for index in range(self.count):
                self.barrier.wait()
                if index == self.index:
                    yield number
        self.barrier.wait()


def measure(cases: Sequence[Case], budget: Budget, schedule: RoundRobin | None = None) -> Any:
    """Measure the cases one by one; return a row each (on every rank; rank 0's are complete).

    Returns None where another group has failed. Raises UserError alike on every rank.
    """
    try:
        return _measure(cases, budget, schedule)
    except BrokenBarrierError:
        return None
    except UserError:
        if schedule is not None:
            schedule.barrier.abort()
        raise


def _measure(
    cases: Sequence[Case], budget: Budget, schedule: RoundRobin | None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{} for _ in cases]
    steps: list[list[dict[str, float]]] = [[] for _ in cases]
    for number in schedule.rounds(budget.rounds) if schedule else range(budget.rounds):
        for case, row, taken in zip(cases, rows, steps, strict=True):
            if number == 0:
                harness = _first_round(case, budget, row)
            else:
                harness = build_harness(case.config, stream=budget.stream)
                harness.step()
            taken += [_time(harness) for _ in range(budget.steps)]
            del harness
            gc.collect()
    for row, taken in zip(rows, steps, strict=True):
        row |= _summary(row, taken)
    return rows


def _first_round(case: Case, budget: Budget, row: dict[str, Any]) -> StepHarness:
    """Build the case and describe it, with its memory and its traffic."""
    build = partial(build_harness, case.config, stream=budget.stream)
    harness, memory = measure_memory(build, StepHarness.step)
    row |= _describe(case, harness, budget.stream)
    row["memory_bytes"] = memory_parts(memory, **harness.known_bytes())
    row["sent_bytes"] = bytes_sent_by_part(harness.step)
    return harness


def _time(harness: StepHarness) -> dict[str, float]:
    """Take a step; return its seconds on this rank by part, and as a whole under "whole".

    It ends when the slowest rank has: the others' wait for it belongs to no part, but to the whole.
    """
    distributed.barrier()
    synchronize()
    watch = step_timer.Clock(distributed.device())
    with step_timer.listening(watch):
        started = time.perf_counter()
        harness.step()
        synchronize()
        distributed.barrier()
        whole = time.perf_counter() - started
        return {**watch.read(), "whole": whole}


def _describe(case: Case, harness: StepHarness, stream: bool) -> dict[str, Any]:
    config = harness.config
    hosts = distributed.all_gather_object(socket.gethostname())
    return {
        "series": case.series,
        "varied": case.varied,
        "workload": _workload(config, stream),
        "world_size": case.world_size,
        "nodes": len(set(hosts)),
        "runs": case.runs,
        "global_batch": config.global_batch_size,
        "chunk_size": config.fixed_chunk_size,
        "keep_graphs": harness.keep_graphs,
        "zero_stage": config.engine.zero_stage,
        "coalesce": config.engine.coalesce,
        "precision": config.engine.precision,
        "loss": config.loss.name,
        "transport": config.loss.transport,
        "embedding": config.model.embed_dim,
        "negatives": config.data.negatives,
        "parameters": harness.num_parameters(),
        "flops_per_pair": vars(harness.flops),
    }


def _workload(config: TrainConfig, stream: bool) -> str:
    """Say what is trained on what, apart from the settings that a row has of its own."""
    image, text = config.model.image, config.model.text
    trunk = text.weights or f"{text.kind} {text.width} x {text.depth}"
    words = [f"{image.name} {image.size} px", f"{trunk} {text.max_tokens} tokens"]
    words += [f"{config.model.embed_dim} dimensions", config.optim.name]
    words += ["image frozen"] * image.frozen + ["text frozen"] * text.frozen
    words += ["streamed"] * stream
    return ", ".join(words)


def _summary(row: dict[str, Any], steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Join the ranks: a step, and each of its parts, takes as long as on their average."""
    names = list(steps[0])
    here = torch.tensor([[step[name] for name in names] for step in steps], dtype=torch.float64)
    here = here.to(distributed.device())  # (steps, parts), the whole at the end
    means = distributed.all_reduce_mean(here)
    wholes: list[float] = means[:, -1].tolist()
    median = statistics.median_low(wholes)
    parts = means[wholes.index(median), :-1].tolist()
    negatives = row["global_batch"] * row["negatives"]
    of_pair = Flops(**row["flops_per_pair"])
    flops = of_pair.of_step(row["global_batch"], row["embedding"], negatives)
    peak = peak_flops(distributed.device(), row["precision"])
    flops_per_s = flops / median / row["world_size"]
    return {
        "step_seconds": median,
        "all_step_seconds": wholes,
        "pairs_per_s": row["global_batch"] / median,
        "rank_flops_per_s": flops_per_s,
        "mfu": flops_per_s / peak if peak else None,
        "seconds": dict(zip(names[:-1], parts, strict=True)),
    }
