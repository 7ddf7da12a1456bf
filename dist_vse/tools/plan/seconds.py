"""Seconds of a step by part: those that `dist-vse bench scale` measures.

b rows on a rank, N on all, d embedding, K chunks, m kept graphs. Encoders: K forwards, K backwards
and K - m forwards again, which is 1 + (K - m) / 3K of a step without chunks where a backward takes
two forwards. Loss: four products of b N d (three with kept similarities, one for the hardest).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from dist_vse.tools.plan.hardware import ChunkSpeed, Hardware
from dist_vse.tools.plan.settings import Settings
from dist_vse.tools.plan.traffic import (
    GB,
    Collective,
    engine_collectives,
    feature_collectives,
    loss_collectives,
    total_seconds,
)
from dist_vse.tools.plan.work import FP32, Ops, Work

TERA = 1e12
ADAM_BYTES = 40  # an element: weight, gradient and two moments, read and written, temporaries
PASS_BYTES = 36  # an entry of a tile, forward: written, raised, summed twice, compared
BACK_BYTES = 28  # backward: multiplied by its weight, and read by two products


@dataclass(frozen=True)
class Seconds:
    """A step's parts, one after another."""

    encode: float
    gather: float
    """The loss's collectives, as far as nothing hides them."""
    loss: float
    second_pass: float
    reduce: float
    """The engine's collectives."""
    step: float
    useful: float
    """Of the encoders' seconds: those of one forward and one backward a pair."""

    @property
    def total(self) -> float:
        """Return the step's seconds."""
        return sum(self.parts().values())

    @property
    def efficiency(self) -> float:
        """Return the share of the step that encodes and differentiates every pair once."""
        return self.useful / self.total

    def parts(self) -> dict[str, float]:
        """Return the seconds by part."""
        names = ("encode", "gather", "loss", "second_pass", "reduce", "step")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ChunkSeconds:
    """What a chunk takes."""

    forward: float
    graph: float
    backward: float
    frozen: float


def step_seconds(work: Work, settings: Settings, hardware: Hardware) -> Seconds:
    """Return the seconds of a step by part."""
    chunk = chunk_seconds(work, settings.chunk, hardware, settings.world_size)
    chunks, kept = settings.num_chunks, settings.kept
    once = chunks - kept
    full = settings.rank_batch / settings.chunk  # the last chunk may be smaller
    shrink = full / chunks
    encode = shrink * (once * chunk.forward + kept * chunk.graph + chunks * chunk.frozen)
    again = shrink * (once * chunk.graph + chunks * chunk.backward)
    hooks = hook_seconds(work, settings, hardware)
    encode, again = encode + hooks[0], again + hooks[1]
    useful = full * (chunk.graph + chunk.backward + chunk.frozen)
    loss = loss_seconds(work, settings, hardware)
    gather = gather_seconds(work, settings, hardware, hidden_by=loss)
    reduce = reduce_seconds(work, settings, hardware, hidden_by=shrink * chunk.backward)
    step = optimizer_seconds(work, settings, hardware)
    return Seconds(encode, gather, loss, again, reduce, step, useful)


def chunk_seconds(work: Work, rows: int, hardware: Hardware, world_size: int) -> ChunkSeconds:
    """Return what a chunk takes: as measured, where this model was; else by its operations."""
    measured = [speed for speed in hardware.chunks if speed.model == work.model]
    if measured:
        return _measured(measured, rows, hardware, world_size)

    def of(ops: Ops) -> float:
        return rows_seconds(ops, rows, hardware, work.precision) * hardware.crowding(world_size)

    forward = of(work.forward)
    return ChunkSeconds(forward, forward, of(work.backward), of(work.frozen_forward))


def hook_seconds(work: Work, settings: Settings, hardware: Hardware) -> tuple[float, float]:
    """Return what ZeRO 3's hooks add to the first and to the second pass, where it was measured."""
    measured = [speed for speed in hardware.chunks if speed.model == work.model]
    if settings.zero_stage < 3 or not measured:
        return 0.0, 0.0
    crowding = hardware.crowding(settings.world_size)
    forward = crowding * max(speed.hooks_forward_s for speed in measured)
    backward = crowding * max(speed.hooks_backward_s for speed in measured)
    chunks, once = settings.num_chunks, settings.num_chunks - settings.kept
    return chunks * forward, once * forward + chunks * backward


def rows_seconds(ops: Ops, rows: int, hardware: Hardware, precision: str) -> float:
    """Return the seconds of some pairs' operators, one after another on one device."""
    matmul, conv = (rate * TERA for rate in hardware.rates(precision))
    products = (ops.matmul_flops / matmul + ops.conv_flops / conv) / hardware.attained_encoders
    passes = ops.moved_bytes / (hardware.memory_gb_per_s * GB)
    return rows * (products + passes) + ops.calls * hardware.launch_us * 1e-6


def _measured(
    speeds: list[ChunkSpeed], rows: int, hardware: Hardware, world_size: int
) -> ChunkSeconds:
    """Interpolate between measured sizes of a chunk and numbers of processes, a pair's seconds."""
    ranks = hardware.ranks_on_node(world_size)
    together = sorted({speed.together for speed in speeds})
    nearest = [n for n in together if n <= ranks] or together[:1]
    of_both = [s for s in speeds if s.together == nearest[-1]]
    crowding = max(1.0, ranks / max(hardware.cores, nearest[-1]))

    def of(name: str) -> float:
        points = sorted((s.rows, getattr(s, name) / s.rows) for s in of_both)
        return rows * crowding * interpolate(points, rows)

    return ChunkSeconds(of("forward_s"), of("graph_s"), of("backward_s"), of("frozen_s"))


def interpolate(points: list[tuple[int, float]], x: float) -> float:
    """Return the value at x, linear in its logarithm; at the ends the nearest point's."""
    for (left, low), (right, high) in pairwise(points):
        if left <= x <= right:
            share = math.log(x / left) / math.log(right / left)
            return low + share * (high - low)
    return points[0][1] if x < points[0][0] else points[-1][1]


def loss_seconds(work: Work, settings: Settings, hardware: Hardware) -> float:
    """Return the loss's own work on a rank: its products, and its passes over the tiles."""
    entries = float(settings.rank_batch) * settings.columns
    in_float32 = "tf32" if work.precision == "tf32" else "fp32"
    rate, _ = hardware.rates("bf16" if settings.bf16_products else in_float32)
    products = 2 * work.embed_dim * entries / (rate * TERA * hardware.attained_loss)
    passes = entries / (hardware.memory_gb_per_s * GB)
    if hardware.cores:  # tiles stay in the cache, and `attained_loss` was measured with them
        passes = 0.0
    again = 1 - settings.kept_similarities / settings.similarity_bytes
    if not settings.loss_spec.cost.dense_gradient:
        taken = products + PASS_BYTES * passes
    else:
        taken = (3 + again) * products + ((1 + again) * PASS_BYTES + BACK_BYTES) * passes
    return taken * hardware.crowding(settings.world_size)


def gather_seconds(
    work: Work, settings: Settings, hardware: Hardware, *, hidden_by: float
) -> float:
    """Return the collectives of the loss; a ring's messages hide behind the work on its blocks."""
    every = loss_collectives(settings, work.embed_dim)
    moving = feature_collectives(settings, work.embed_dim)
    world_size = settings.world_size
    taken = total_seconds(moving, hardware, world_size)
    rest = total_seconds(every, hardware, world_size) - taken
    if settings.ring and not hardware.cores:  # where cores are shared, messages take them too
        taken = max(_exposed(moving, hardware, world_size), taken - hidden_by)
    return taken + rest


def reduce_seconds(
    work: Work, settings: Settings, hardware: Hardware, *, hidden_by: float
) -> float:
    """Return the engine's collectives; but for ZeRO 3, during the last backward."""
    every, world_size = engine_collectives(work, settings), settings.world_size
    taken = total_seconds(every, hardware, world_size)
    once = settings.zero_stage < 2 or (settings.zero_stage == 2 and settings.coalesce)
    if hardware.cores or not once or not work.trainable:  # cores: see `gather_seconds`
        return taken
    gradients = total_seconds(every[:1], hardware, world_size)
    return taken - min(hidden_by, gradients * (1 - work.last / work.trainable))


def _exposed(exchanges: list[Collective], hardware: Hardware, world_size: int) -> float:
    """Return what no work hides: the return of the last gradients to their rank."""
    gradients = exchanges[-1]
    return gradients.seconds(hardware, world_size) / gradients.calls


def optimizer_seconds(work: Work, settings: Settings, hardware: Hardware) -> float:
    """Return AdamW's seconds for this rank's share."""
    share = 1 if settings.zero_stage == 0 else settings.world_size
    element = hardware.optimizer_ns * 1e-9 or ADAM_BYTES / (hardware.memory_gb_per_s * GB)
    crowding = hardware.crowding(settings.world_size)
    return crowding * element * work.gradient_bytes / FP32 / share
