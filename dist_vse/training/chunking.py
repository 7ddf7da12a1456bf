"""How large a chunk is, and how many of their graphs stay in memory: found by trying.

A try is a chunk of made-up pairs, encoded and differentiated by the model before the engine
stands around it. It leaves no trace: no gradient, no BatchNorm statistics, no random draw.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from dist_vse.common.memory import Allocated, measure
from dist_vse.common.random_state import random_state, replay
from dist_vse.common.units import GIB
from dist_vse.config import TrainConfig
from dist_vse.engine.zero import max_live_graphs
from dist_vse.models.dual_encoder import DualEncoder, frozen_statistics, made_up_pairs
from dist_vse.models.precision import autocast

FREE_SHARE = 0.5  # of the free memory; the rest is for data, features, and captions that are longer
STATE_BYTES = 16  # a trainable parameter: its gradient, Adam's two moments, DeepSpeed's flat copy
FIRST_TRY = 8  # pairs


@dataclass(frozen=True)
class Pairs:
    """What a made-up pair looks like; each caption has as many tokens as it may have."""

    image_size: int
    num_tokens: int
    negatives: int = 0  # a pair's


@dataclass(frozen=True)
class Chunking:
    """How a rank's batch is encoded."""

    chunk_size: int
    keep_graphs: int


def choose_chunks(config: TrainConfig, model: DualEncoder) -> Chunking:
    """Return this rank's chunk size and number of kept graphs, found by trying where auto."""
    chunk_size = config.asked_chunk_size(on_gpu=distributed.device().type == "cuda")
    keep_graphs = config.cache.keep_graphs
    return choose_chunking(
        model,
        Pairs(config.model.image.size, config.model.text.max_tokens, config.data.negatives),
        rank_batch_size=config.global_batch_size // distributed.world_size(),
        chunk_size=chunk_size,
        keep_graphs=None if isinstance(keep_graphs, str) else keep_graphs,
        max_live_graphs=max_live_graphs(config.engine),
        memory_gib=config.cache.memory_gib,
        precision=config.engine.precision,
    )


def choose_chunking(
    model: DualEncoder,
    pairs: Pairs,
    *,
    rank_batch_size: int,
    chunk_size: int | None,
    keep_graphs: int | None,
    max_live_graphs: int | None,
    memory_gib: float,
    precision: str,
) -> Chunking:
    """Return this rank's choice where a number is None (see `agree`).

    `memory_gib` is for activations; 0 is half of what is free. `max_live_graphs` bounds the
    choice of kept graphs. Raises UserError if not even the smallest chunk fits.
    """
    budget = memory_gib * GIB if memory_gib else _free_bytes(model)
    if chunk_size is None:
        chunk_size = _largest_chunk(model, pairs, rank_batch_size, budget, precision)
    num_chunks = -(-rank_batch_size // chunk_size)
    if keep_graphs is None and num_chunks == 1:
        keep_graphs = 1
    if keep_graphs is None:
        graph = _try(model, pairs, chunk_size, precision)
        # Where memory has no room for one graph, the second pass has none either: 1 is no loss.
        fitting = max(1, int(budget // max(1, graph.held))) if graph else 1
        keep_graphs = min(num_chunks, fitting, max_live_graphs or num_chunks)
    return Chunking(chunk_size, keep_graphs)


def agree(choice: Chunking) -> Chunking:
    """Return the choice of the rank that has the least memory, on every rank."""
    numbers = torch.tensor([choice.chunk_size, choice.keep_graphs], device=distributed.device())
    chunk_size, keep_graphs = distributed.all_reduce_min(numbers).tolist()
    return Chunking(int(chunk_size), int(keep_graphs))


def _largest_chunk(
    model: DualEncoder, pairs: Pairs, rank_batch_size: int, budget: float, precision: str
) -> int:
    """Return the largest divisor of the rank's batch whose try stays within the budget.

    Bytes grow with the pairs along a line, which two small tries give; nothing is tried that would
    not fit by it.
    """
    sizes = [n for n in range(1, rank_batch_size + 1) if rank_batch_size % n == 0]
    sizes = [n for n in sizes if n > 1] or sizes  # BatchNorm needs two rows
    peaks: list[tuple[int, int]] = []
    for size in [n for n in sizes if n >= FIRST_TRY][:2] or sizes[-1:]:
        found = _try(model, pairs, size, precision)
        if found is None or found.peak > budget:
            break
        peaks.append((size, found.peak))
    if len(peaks) == 2:
        (fewer, less), (rows, peak) = peaks
        bound = rows + (budget - peak) * (rows - fewer) / max(1, peak - less)
    else:
        bound = size
    known = dict(peaks)
    fitting = 0
    for size in sorted((n for n in sizes if n <= bound), reverse=True):
        if size in known or (
            (found := _try(model, pairs, size, precision)) and found.peak <= budget
        ):
            fitting = size
            break
    if not fitting:
        raise UserError(
            f"not even {sizes[0]} pairs fit in {budget / GIB:.2g} GiB: raise cache.memory_gib, "
            "choose a smaller model, or set model.grad_checkpointing=true"
        )
    return fitting


def _try(model: DualEncoder, pairs: Pairs, rows: int, precision: str) -> Allocated | None:
    """Encode and differentiate a chunk; return what its graph holds, and the peak of it all.

    None stands for memory that ran out.
    """
    here = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    made_up = made_up_pairs(
        model,
        rows,
        image_size=pairs.image_size,
        num_tokens=pairs.num_tokens,
        negatives=pairs.negatives,
    )

    def encode() -> Tensor:
        with autocast(here, precision):
            inputs = model.prepare(**{name: value.to(here) for name, value in made_up.items()})
            outputs: tuple[Tensor, ...] = model(**inputs)
        return torch.stack([output.sum() for output in outputs]).sum()

    try:
        # Nothing is compiled for a size that is only tried: eager code needs no less memory.
        eager = torch.compiler.set_stance("force_eager")
        with replay(random_state()), frozen_statistics(model), eager:
            total, forward = measure(encode, here)
            _, backward = measure(
                lambda: torch.autograd.grad(total, parameters, allow_unused=True), here
            )
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    peak = max(forward.peak, forward.held + backward.peak)
    logger.debug("a chunk of %d pairs: %.3f GiB at most", rows, peak / GIB)
    return Allocated(forward.held, peak)


def _free_bytes(model: DualEncoder) -> float:
    """Return what a rank may fill with activations."""
    here = next(model.parameters()).device
    if here.type == "cuda":
        free = float(torch.cuda.mem_get_info(here)[0])
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
        free = min(float(psutil.virtual_memory().available), _cgroup_free()) / ranks
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return max(0.0, FREE_SHARE * (free - STATE_BYTES * trainable))


def _cgroup_free(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Return what this process's cgroups (a Slurm job's, a container's) let it allocate."""
    if not own.is_file():
        return float("inf")
    lines = own.read_text().splitlines()
    folder = root / next((line[4:] for line in lines if line.startswith("0::/")), "")
    free = float("inf")
    for group in (folder, *folder.parents):
        limit, current = group / "memory.max", group / "memory.current"
        if limit.is_file() and current.is_file() and limit.read_text().strip() != "max":
            free = min(free, float(limit.read_text()) - float(current.read_text()))
    return free
