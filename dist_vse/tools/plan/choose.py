"""The best settings for a batch and some ranks: every choice is priced, the fastest taken."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from dist_vse.common.errors import UserError
from dist_vse.common.units import GIB
from dist_vse.tools.plan.hardware import Hardware
from dist_vse.tools.plan.memory import Memory, Place, fullest, moments
from dist_vse.tools.plan.seconds import Seconds, step_seconds
from dist_vse.tools.plan.settings import Settings
from dist_vse.tools.plan.traffic import engine_collectives, loss_collectives, sent_bytes
from dist_vse.tools.plan.work import Work

MARGIN = 0.9  # of the memory: the rest is for fragments, and for what the model leaves out
EQUAL = 1.02  # times the fastest: as fast, so that the plainer settings win
SIMPLEST = (1, 0, 2, 3)  # ZeRO stages, the plainest for this code first


@dataclass(frozen=True)
class Plan:
    """Settings with what they cost."""

    settings: Settings
    seconds: Seconds
    memory: Memory
    moments: list[Memory]
    rank_memory: float
    """Bytes that a rank may fill."""
    sent: float
    """Bytes that leave a rank in a step."""

    @property
    def fits(self) -> bool:
        """Return whether the step stays within the memory, with a margin."""
        return self.memory.total <= MARGIN * self.rank_memory

    @property
    def pairs_per_s(self) -> float:
        """Return the pairs of all ranks a second."""
        return self.settings.global_batch / self.seconds.total


def price(work: Work, settings: Settings, hardware: Hardware) -> Plan:
    """Return what settings cost."""
    every = moments(
        work, settings, Place(on_cpu=hardware.cores > 0, device_gib=hardware.memory_gib)
    )
    sent = sent_bytes(loss_collectives(settings, work.embed_dim), settings.world_size)
    sent += sent_bytes(engine_collectives(work, settings), settings.world_size)
    return Plan(
        settings,
        step_seconds(work, settings, hardware),
        fullest(every),
        every,
        hardware.rank_memory(settings.world_size),
        sent,
    )


def check_batch(global_batch: int, world_size: int, hardware: Hardware) -> None:
    """Raise UserError for a batch or a number of ranks that cannot be."""
    if global_batch < 1 or world_size < 1:
        raise UserError(f"--batch ({global_batch}) and --gpus ({world_size}) must be at least 1")
    if global_batch % world_size:
        below = global_batch // world_size * world_size
        near = ", ".join(str(n) for n in (below, below + world_size) if n)
        raise UserError(
            f"--batch ({global_batch}) must be a multiple of --gpus ({world_size}); nearest: {near}"
        )
    per_node = hardware.ranks_per_node
    if world_size > per_node and world_size % per_node:
        raise UserError(
            f"--gpus ({world_size}) must fill nodes of {per_node} ({hardware.name}); nearest: "
            f"{world_size // per_node * per_node}, {-(-world_size // per_node) * per_node}"
        )


def choose(work: Work, start: Settings, hardware: Hardware) -> Plan:
    """Return the best plan for the batch, ranks and loss of `start`.

    If nothing fits it is the one that needs the least memory.
    """
    plans = [price(work, settings, hardware) for settings in candidates(start)]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.memory.total)
    fastest = min(plan.seconds.total for plan in fitting)
    equal = [plan for plan in fitting if plan.seconds.total <= EQUAL * fastest]

    def plainness(plan: Plan) -> tuple[int, bool, int, bool, float]:
        """Order by what is nearest to the defaults, then by the fewest chunks and least memory."""
        one = plan.settings
        stage, budget = SIMPLEST.index(one.zero_stage), one.loss_gib != start.loss_gib
        return stage, one.ring, one.num_chunks, budget, plan.memory.total

    return min(equal, key=plainness)


def candidates(start: Settings) -> Iterator[Settings]:
    """Yield all settings that may be chosen."""
    rows = start.rank_batch
    chunks = [rows // count for count in range(1, rows + 1) if rows % count == 0]
    chunks = _thin([chunk for chunk in chunks if chunk > 1] or chunks)
    budgets = {0.0, start.loss_gib, start.similarity_bytes / GIB}
    budgets = budgets if start.loss_spec.cost.dense_gradient else {0.0}
    transports = ("gather", "ring") if start.world_size > 1 else ("gather",)
    for chunk, stage in itertools.product(chunks, SIMPLEST):
        for transport, budget in itertools.product(transports, sorted(budgets)):
            for kept in kept_choices(rows // chunk):
                yield start.changed(
                    chunk_size=chunk,
                    zero_stage=stage,
                    transport=transport,
                    loss_gib=budget,
                    keep_graphs=kept,
                )


def kept_choices(chunks: int) -> list[int]:
    """Return how many graphs may stay: one (which costs nothing), shares of all, all."""
    return sorted({1, *(max(1, chunks * share // 8) for share in range(1, 9))})


def explain(plan: Plan, work: Work) -> str:
    """Say in a line why these settings, or what to change where nothing fits."""
    settings, memory = plan.settings, plan.memory
    limit = f"{plan.rank_memory / GIB:.1f} GiB"
    if not plan.fits:
        return (
            f"doesn't fit: at least {memory.total / GIB:.1f} of {limit} a rank, most of it "
            f"{_largest(memory)}; {_remedy(memory)}"
        )
    parts = []
    if settings.num_chunks == 1:
        parts.append("the whole share fits at once, so nothing is encoded twice")
    else:
        kept = f"{settings.kept} of {settings.num_chunks} chunks keep their graphs within {limit}"
        others = settings.num_chunks > settings.kept
        parts.append(kept + ("; the others are encoded twice" if others else ""))
    parts.append(f"ZeRO {settings.zero_stage}: state takes {memory.state / GIB:.2f} GiB")
    everyone = settings.caption_bytes * settings.global_batch * work.embed_dim / GIB
    if settings.world_size > 1 and settings.ring:
        parts.append(f"a ring, since all captions are {everyone:.1f} GiB and its messages hide")
    elif settings.world_size > 1:
        parts.append(f"gather: all captions are {everyone:.2g} GiB, and a ring sends them twice")
    return "; ".join(parts)


def as_overrides(plan: Plan) -> str:
    """Write the settings as the config's own keys."""
    settings = plan.settings
    words = {
        "global_batch_size": settings.global_batch,
        "chunk_size": settings.chunk,
        "cache.keep_graphs": settings.kept,
        "engine.zero_stage": settings.zero_stage,
        "loss.transport": settings.transport,
        "loss.memory_gib": f"{settings.loss_gib:.4g}",
    }
    return " ".join(f"{key}={value}" for key, value in words.items())


def _thin(chunks: list[int]) -> list[int]:
    """Leave out sizes that are close to others: about two for each power of two."""
    kept: list[int] = []
    for chunk in sorted(chunks, reverse=True):
        if not kept or chunk <= 0.7 * kept[-1]:
            kept.append(chunk)
    return kept


def _largest(memory: Memory) -> str:
    parts = memory.parts()
    return max(parts, key=lambda name: parts[name])


def _remedy(memory: Memory) -> str:
    remedies = {
        "inputs": "more ranks, or a smaller batch",
        "state": "a smaller model, or more ranks (ZeRO 3 spreads it)",
        "gradients": "a smaller model, or engine.coalesce=false",
        "activations": "model.grad_checkpointing=true, or more ranks",
        "features": "more ranks, a smaller batch, or a smaller model.embed_dim",
        "similarities": "loss.memory_gib=0",
    }
    return remedies[_largest(memory)]
