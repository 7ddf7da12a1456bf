"""What every process of `dist-vse bench scale` does: train some steps of each case, and measure.

A step is the one of `dist-vse train`, by the same builders. Each visit to a case builds the engine
anew, so that only one stands in memory at a time, and warms it up.
"""

import gc
import itertools
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import numpy as np
import torch

from dist_vse import clock, distributed
from dist_vse.bench.cache_model import VOCABULARY
from dist_vse.bench.scale_cases import Case
from dist_vse.bench.scale_memory import memory_parts, weigh
from dist_vse.bench.traffic import bytes_sent_by_part
from dist_vse.builders import (
    build_loss,
    build_train_batches,
    choose_chunks,
    make_chunks,
    wrap_model,
)
from dist_vse.checkpoint import Progress
from dist_vse.chunking import agree
from dist_vse.config import TrainConfig
from dist_vse.engine.zero import ZeroEngine
from dist_vse.errors import UserError
from dist_vse.grad_cache import train_step
from dist_vse.metrics import synchronize
from dist_vse.models.build import build_model
from dist_vse.run_dir import open_train_sets, run_model, run_tokenizer
from dist_vse.stream import Batch


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int
    steps: int
    """Timed steps of a visit."""
    stream: bool
    """Read the config's data, not made-up pairs."""


@dataclass(frozen=True)
class Turns:
    """Lets teams of processes work one after another; who waits leaves the cores to the others."""

    barrier: Any  # of multiprocessing, for the processes of all teams
    mine: int
    count: int

    def rounds(self, count: int) -> Iterator[int]:
        """Yield the number of each round when it is this team's turn."""
        for number in range(count):
            for turn in range(self.count):
                self.barrier.wait()
                if turn == self.mine:
                    yield number
        self.barrier.wait()


@dataclass(frozen=True)
class _Rig:
    config: TrainConfig
    engine: ZeroEngine
    batches: Iterator[Batch]
    keep_graphs: int

    def step(self) -> None:
        """Take one step, as `dist_vse.train` does."""
        clock.begin("data")
        batch = next(self.batches)
        clock.begin("encode")
        loss_fn = build_loss(self.config, batch, 0, {})
        chunks = make_chunks(self.engine.module, batch, self.config)
        train_step(self.engine, loss_fn, chunks, keep_graphs=self.keep_graphs)

    def known_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's inputs, features and gradients."""
        rows = self.config.global_batch_size // distributed.world_size()
        pixels, tokens = 3 * self.config.model.image.size**2, self.config.model.text.max_tokens
        trainable = [p for p in self.engine.module.parameters() if p.requires_grad]
        return {
            "inputs": rows * (pixels + 8 * tokens),
            "outputs": 2 * 4 * rows * self.config.model.embed_dim,
            "gradients": sum(getattr(p, "ds_numel", p.numel()) * p.itemsize for p in trainable),
        }


def measure(cases: Sequence[Case], effort: Effort, turns: Turns | None = None) -> Any:
    """Measure the cases in turn; return a row each (on every rank; rank 0's are complete).

    Returns None where another team has failed.
    """
    try:
        return _measure(cases, effort, turns)
    except BrokenBarrierError:
        return None
    except UserError:
        if turns is not None:
            turns.barrier.abort()
        raise


def _measure(cases: Sequence[Case], effort: Effort, turns: Turns | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{} for _ in cases]
    steps: list[list[dict[str, float]]] = [[] for _ in cases]
    for number in turns.rounds(effort.rounds) if turns else range(effort.rounds):
        for case, row, taken in zip(cases, rows, steps, strict=True):
            if number == 0:
                rig = _first_visit(case, effort, row)
            else:
                rig = _build(case.config, effort.stream)
                rig.step()
            taken += [_time(rig) for _ in range(effort.steps)]
            del rig
            gc.collect()
    for row, taken in zip(rows, steps, strict=True):
        row |= _summary(row, taken)
    return rows


def _first_visit(case: Case, effort: Effort, row: dict[str, Any]) -> _Rig:
    rig, borders = weigh(lambda: _build(case.config, effort.stream), _Rig.step)
    row |= _describe(case, rig)
    row["memory_bytes"] = memory_parts(borders, **rig.known_bytes())
    row["sent_bytes"] = bytes_sent_by_part(rig.step)
    return rig


def _build(config: TrainConfig, stream: bool) -> _Rig:
    with distributed.same_verdict(), tempfile.TemporaryDirectory() as folder:
        tokenizer = None
        if stream or config.model.text.kind == "pretrained":
            tokenizer = run_tokenizer(config, Path(folder), build=True)
        if tokenizer is not None:
            model = run_model(config, tokenizer)
        else:
            model = build_model(
                config.model,
                vocab_size=VOCABULARY,
                pad_id=0,
                temperature=config.loss.temperature,
                learn_temperature=config.loss.learn_temperature,
                bias=config.loss.bias,
                learn_bias=config.loss.name == "siglip",
                seed=config.seed,
            )
        model = model.to(distributed.device())
        chunking = choose_chunks(config, model)
    chunking = agree(chunking)
    config = replace(config, chunk_size=chunking.chunk_size)
    if stream:
        assert tokenizer is not None
        sets = open_train_sets(config)
        batches = build_train_batches(config, sets, tokenizer, Progress(0, 0, []))
    else:
        batches = itertools.repeat(_made_up(config))
    return _Rig(config, wrap_model(config, model), batches, chunking.keep_graphs)


def _made_up(config: TrainConfig) -> Batch:
    """Draw this rank's pairs of a global batch; all of them different."""
    rows, size = config.global_batch_size // distributed.world_size(), config.model.image.size
    generator = torch.Generator().manual_seed(distributed.rank())
    images = torch.randint(0, 256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)
    words = (rows, config.model.text.max_tokens)
    ids = distributed.rank() * rows + torch.arange(rows)
    return Batch(
        images=images,
        tokens=torch.randint(1, VOCABULARY, words, generator=generator),
        image_ids=ids,
        text_ids=ids,
        origin=torch.stack([torch.zeros_like(ids), ids], 1),
        state=np.zeros((0, 2), np.int64),
        skipped=(),
    )


def _time(rig: _Rig) -> dict[str, float]:
    """Take a step; return its seconds on this rank by part, and as a whole under "whole"."""
    distributed.barrier()
    synchronize()
    watch = clock.Clock(distributed.device())
    with clock.listening(watch):
        started = time.perf_counter()
        rig.step()
        synchronize()
        whole = time.perf_counter() - started
        return {**watch.read(), "whole": whole}


def _describe(case: Case, rig: _Rig) -> dict[str, Any]:
    config = rig.config
    hosts = distributed.all_gather_object(socket.gethostname())
    return {
        "series": case.series,
        "world_size": case.world_size,
        "nodes": len(set(hosts)),
        "runs": case.runs,
        "global_batch": config.global_batch_size,
        "chunk_size": config.fixed_chunk_size,
        "keep_graphs": rig.keep_graphs,
        "zero_stage": config.engine.zero_stage,
        "coalesce": config.engine.coalesce,
        "precision": config.engine.precision,
        "loss": config.loss.name,
        "transport": config.loss.transport,
    }


def _summary(row: dict[str, Any], steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Join the ranks: a step takes as long as on the slowest of them, its parts as on average."""
    names = list(steps[0])
    here = torch.tensor([[step[name] for name in names] for step in steps], dtype=torch.float64)
    here = here.to(distributed.device())
    wholes: list[float] = distributed.all_reduce_max(here[:, -1].clone()).tolist()
    means = distributed.all_reduce_mean(here)
    median = statistics.median_low(wholes)
    parts = means[wholes.index(median), :-1].tolist()
    return {
        "step_seconds": median,
        "all_step_seconds": wholes,
        "pairs_per_s": row["global_batch"] / median,
        "seconds": dict(zip(names[:-1], parts, strict=True)),
    }
