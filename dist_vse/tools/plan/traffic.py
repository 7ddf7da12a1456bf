"""The collectives of a step: how many bytes each moves, and how long that takes.

A network has two levels, inside a node and between nodes; a message takes alpha + bytes / speed on
each. Rings pass every level, so the slowest link of those in use sets their pace (Thakur et al.,
2005, https://doi.org/10.1177/1094342005051521). N rows on all ranks, d embedding, W ranks.
"""

import math
from dataclasses import dataclass

from dist_vse.losses.registry import find_loss
from dist_vse.tools.plan.hardware import Hardware, LinkConfig
from dist_vse.tools.plan.settings import Settings
from dist_vse.tools.plan.work import FP32, Work

GB = 1e9
IDS = 16  # bytes of a pair's two ids; a text without an image has one
PREFLIGHT = 72.0  # bytes that a rank sends to the others before a loss (losses/preflight.py)
_SHARES = {"all_gather": 1.0, "reduce_scatter": 1.0, "reduce": 1.0, "all_reduce": 2.0}
_ADDING = ("all_reduce", "reduce")


@dataclass(frozen=True)
class Collective:
    """A collective, or several alike; `exchange` is a message to one rank and one from another."""

    kind: str
    num_bytes: float
    """Of the whole: what a gather gives, what a reduction takes; of an exchange's message."""
    calls: float = 1.0

    def sent(self, world_size: int) -> float:
        """Return the bytes that leave a rank, if each part goes to who lacks it once."""
        if world_size == 1:
            return 0.0
        if self.kind == "exchange":
            return self.num_bytes * self.calls
        share = (world_size - 1) / world_size
        return _SHARES[self.kind] * share * self.num_bytes * self.calls

    def seconds(self, hardware: Hardware, world_size: int) -> float:
        """Return how long all of it takes."""
        if world_size == 1:
            return 0.0
        levels = _levels(hardware, world_size)
        crowding = hardware.crowding(world_size)
        if self.kind == "exchange":
            # Each message waits for the slowest link.
            slowest = max(alpha_beta(link, self.num_bytes) for link, _ in levels)
            return crowding * self.calls * slowest
        rounds = _SHARES[self.kind] * self.calls
        alpha = rounds * sum(self._hops(n) * link.alpha_us * 1e-6 for link, n in levels)
        return crowding * (
            alpha + self.sent(world_size) / (GB * min(self._speed(link) for link, _ in levels))
        )

    def _hops(self, members: int) -> int:
        """Return the hops of a gather's ring, or of a reduction's tree (as NCCL has both)."""
        return math.ceil(math.log2(members)) if self.kind in _ADDING else members - 1

    def _speed(self, link: LinkConfig) -> float:
        return link.reduce_gb_per_s if self.kind in _ADDING else link.copy_gb_per_s


def alpha_beta(link: LinkConfig, num_bytes: float) -> float:
    """Return the seconds of one message between two ranks."""
    return link.alpha_us * 1e-6 + num_bytes / (link.pair_gb_per_s * GB)


def loss_collectives(settings: Settings, width: int) -> list[Collective]:
    """Return the collectives of the loss: features, statistics, gradients (`losses/`)."""
    total = float(settings.global_batch)
    numbers = FP32 * total  # one a row of the batch
    small = [
        Collective("all_gather", IDS * total),
        Collective("all_gather", PREFLIGHT * settings.world_size),
        Collective("all_reduce", 48.0),  # telemetry
        Collective("all_reduce", FP32),  # the loss
    ]
    cost = find_loss(settings.loss).cost
    if settings.negatives:
        small += [Collective("all_gather", IDS / 2 * total * settings.negatives)]
    small += [Collective("all_gather", numbers)] * cost.gathers
    # Hinges and dcl reduce the negatives' columns as well: 8 bytes each, next to 4 d of features.
    small += [Collective("all_reduce", each * numbers) for each in cost.reduces]
    return small + feature_collectives(settings, width)


def feature_collectives(settings: Settings, width: int) -> list[Collective]:
    """Return the collectives that move features and their gradients."""
    captions = float(settings.global_batch) * width
    moved = _moved(captions, settings)
    return moved + _moved(captions * settings.negatives, settings) if settings.negatives else moved


def _moved(numbers: float, settings: Settings) -> list[Collective]:
    """Return the collectives that move so many numbers of features, and their gradients."""
    features, gradients = settings.caption_bytes * numbers, FP32 * numbers
    if not settings.ring:
        return [Collective("all_gather", features), Collective("reduce_scatter", gradients)]
    # Once for the features; once more with the gradients, which end at their own rank.
    ranks = settings.world_size
    return [
        Collective("exchange", features / ranks, calls=2 * (ranks - 1)),
        Collective("exchange", gradients / ranks, calls=ranks),
    ]


def engine_collectives(work: Work, settings: Settings) -> list[Collective]:
    """Return the collectives of ZeRO: gradients, and parameters (`engine/zero.py`)."""
    full, whole, stage = work.gradient_bytes, work.weight_bytes, settings.zero_stage
    ranks, chunks = settings.world_size, settings.num_chunks
    travels, bf16 = travelling_bytes(work, settings), work.precision == "bf16"
    once = settings.coalesce or stage < 2
    times = 1 if once else chunks
    if stage == 0:
        return [Collective("all_reduce", full / max(1, work.buckets), calls=max(1, work.buckets))]
    if stage < 3:  # to the owner of each share; then everybody gathers the new weights
        calls = max(ranks, work.buckets) if once else ranks * times
        return [
            Collective("reduce", travels * times / calls, calls=calls),
            Collective("all_gather", full),
        ]
    # For every forward and every backward; kept graphs have no second forward.
    passes = 3 * chunks - settings.kept
    small = FP32 * work.persistent
    large = whole - small - (FP32 / 2 * work.lowered if bf16 else 0)
    gathers = max(1, work.gathers)
    return [
        Collective("all_gather", max(0.0, large) / gathers, calls=passes * gathers),
        Collective("all_gather", small),
        Collective("reduce_scatter", travels, calls=times),
    ]


def travelling_bytes(work: Work, settings: Settings) -> float:
    """Return the gradients' bytes as they are sent: under bf16 most of them are halved."""
    halved = work.precision == "bf16" and settings.zero_stage > 0
    return work.gradient_bytes - (FP32 / 2 * work.lowered if halved else 0)


def sent_bytes(collectives: list[Collective], world_size: int) -> float:
    """Return the bytes that leave a rank."""
    return sum(collective.sent(world_size) for collective in collectives)


def total_seconds(collectives: list[Collective], hardware: Hardware, world_size: int) -> float:
    """Return how long the collectives take one after another."""
    return sum(collective.seconds(hardware, world_size) for collective in collectives)


def _levels(hardware: Hardware, world_size: int) -> list[tuple[LinkConfig, int]]:
    """Return the levels that so many ranks use, with the members of a ring on each."""
    inside, nodes = hardware.ranks_on_node(world_size), hardware.nodes(world_size)
    levels = [(hardware.inside, inside)] if inside > 1 else []
    return levels + ([(hardware.between, nodes)] if nodes > 1 else [])
