"""Bytes of a rank, by what they are for and by the moment of the step.

P are the bytes of all gradients, b rows on a rank, N on all, W ranks, d embedding, m kept graphs.
Texts are captions and, where a pair brings some, negatives.
What DeepSpeed's stages hold is what their code holds (deepspeed 0.19, `tests/tools/test_plan.py`
measures the real engine), which is more than the ZeRO paper counts: buckets, flat copies,
and a gradient that is whole until it is reduced.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dist_vse.common.units import GIB
from dist_vse.losses.tiles import CPU_TILE, cuda_tile, tile_shape
from dist_vse.tools.plan.settings import Settings
from dist_vse.tools.plan.traffic import travelling_bytes
from dist_vse.tools.plan.work import FP32, Work

BUCKET = FP32 * (1 << 26)  # bytes; the engine's largest
LIVE = FP32 * 1_000_000_000  # bytes of parameters that ZeRO 3 gathers at most at once
WHOLE_BUCKET = FP32 * 500_000_000  # of ZeRO 0's reduction
VECTORS = 48  # bytes of a row or column of the batch that is no feature: sums, ids, shares


@dataclass(frozen=True)
class Place:
    """Where the step runs, as far as memory sees it."""

    on_cpu: bool
    """Inputs count, gloo needs buffers to add up, and the optimizer goes tensor by tensor."""
    device_gib: float = 80.0
    """A GPU's memory, which sets the size of the loss's tiles."""

    def tile(self, *, dense: bool) -> tuple[int, int]:
        """Return the largest height and width of the loss's tiles."""
        size = CPU_TILE if self.on_cpu else cuda_tile(int(self.device_gib * GIB))
        return tile_shape(size, dense=dense)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the fullest moment of a phase."""

    phase: str
    gradients: float
    """With the engine's buckets, gathered parameters, the optimizer's temporaries."""
    activations: float
    """Of the chunk at hand and of kept graphs."""
    features: float
    """With their copies, gradients, and all ranks' captions."""
    similarities: float
    """Tiles, and similarities that are kept."""
    inputs: float
    state: float
    """Weights, master weights, optimizer, the engine's standing buffers."""

    @property
    def total(self) -> float:
        """Return the sum of the parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Return the bytes by what they are for."""
        names = ("inputs", "state", "gradients", "activations", "features", "similarities")
        return {name: getattr(self, name) for name in names}


def state_bytes(work: Work, settings: Settings) -> float:
    """Return what is held between two steps."""
    whole, trained = work.weight_bytes, work.gradient_bytes
    stage, ranks = settings.zero_stage, settings.world_size
    kept = settings.state_tensors * trained  # by the optimizer
    if stage == 0:
        return whole + kept
    if stage < 3:  # flat weights, and of this rank's share a master copy and the optimizer's state
        return whole + (trained + kept) / ranks
    # Shares of weights, master weights, gradients and optimizer state; a bucket; small parameters
    # whole.
    buckets = min(BUCKET, trained) * (1.5 if work.precision == "bf16" else 1)
    shares = (whole + 2 * trained + kept) / ranks
    return shares + buckets + FP32 * work.persistent


def gradient_bytes(work: Work, settings: Settings) -> dict[str, float]:
    """Return what the engine adds to its state, by phase.

    `gathering` are whole parameters: they come before a forward's activations and go before the
    largest part of them, so that the larger of the two counts.
    """
    full = work.gradient_bytes
    share, stage = full / settings.world_size, settings.zero_stage
    bucket = min(BUCKET, full) * (2 if work.precision == "bf16" else 1)
    gathered = min(LIVE, work.weight_bytes) * (1 if settings.world_size > 1 else 0)
    update = 4 * share  # the share's gradient, a flat copy, and Adam's two temporaries
    # Copies are on their way at the end of the last backward, when activations are gone.
    sent = travelling_bytes(work, settings) if settings.world_size > 1 else 0.0
    if stage == 0:
        reduce = full + max(sent, min(WHOLE_BUCKET, full))
        step = full + 2 * FP32 * work.largest
        return {"gathering": 0.0, "second_pass": full, "reduce": reduce, "step": step}
    if stage < 3 and (stage == 1 or settings.coalesce):
        reduce = full + max(sent, bucket)
        return {"gathering": 0.0, "second_pass": full, "reduce": reduce, "step": update}
    if stage == 2:
        partly = share + bucket + min(BUCKET, full)
        return {"gathering": 0.0, "second_pass": partly, "reduce": partly, "step": update}
    whole = full if settings.coalesce else min(BUCKET, full)
    return {
        "gathering": 1.75 * gathered,  # and the messages that bring them
        "second_pass": whole,
        "reduce": whole + min(BUCKET, full),
        "step": 3 * share,
    }


def activation_bytes(work: Work, settings: Settings) -> dict[str, float]:
    """Return what chunks hold, by phase."""
    chunk, kept = settings.chunk, settings.kept
    held = work.held.of(chunk)
    forward = work.graph_peak.of(chunk) if kept else work.forward_peak.of(chunk)
    again = work.graph_peak.of(chunk) if kept < settings.num_chunks else 0.0
    backward = work.backward_peak.of(chunk)
    return {
        "encode": max(0, kept - 1) * held + forward,
        "loss": kept * held,
        "first_backward": kept * held + backward,
        # Gradients are whole after the first backward, whose graph is gone then.
        "second_pass": max((kept - 1) * held, again) + backward,
    }


def loss_bytes(settings: Settings, width: int, place: Place) -> tuple[float, float]:
    """Return the features (with all that is as wide) and the similarities at the loss's peak."""
    rows, total = settings.rank_batch, settings.columns
    texts = rows * (1 + settings.negatives)
    images, own, everyone = (FP32 * n * width for n in (rows, texts, total))
    dense = settings.loss_spec.cost.dense_gradient
    height, across = place.tile(dense=dense)
    tiles = FP32 * min(rows, height) * min(total, across) * (2 if dense else 1)
    kept = settings.kept_similarities
    share = settings.caption_bytes / FP32  # of the captions that came from other ranks
    scaled = images if settings.loss_spec.similarity_unit is not None else 0.0
    vectors = VECTORS * (rows + total)
    leaves = images + own + (own if settings.negatives else 0.0)  # both kinds of texts, joined
    if settings.ring:
        travelling = (2 * share + 3) * own  # a block and the next, their gradients, the next ones
        return leaves + scaled + images + travelling + vectors, tiles + kept
    gathered = share * everyone if settings.world_size > 1 else 0.0
    standing = leaves + scaled + gathered + images + everyone  # with both sides' gradients
    returned = own if settings.world_size > 1 else 0.0  # gradients that come from other ranks
    if settings.world_size > 1 and place.on_cpu:  # gloo: what all other ranks sent
        returned = everyone - own
    features = standing + vectors
    if returned > tiles + kept:
        return features + returned, 0.0
    return features, tiles + kept


def cache_bytes(settings: Settings, width: int) -> float:
    """Return the cached gradients of the features, which are held through the second pass."""
    return FP32 * float(settings.rank_batch) * width * (2 + settings.negatives)


def prefetched_bytes(settings: Settings, width: int) -> float:
    """Return all ranks' captions, which are gathered while chunks are encoded."""
    gathers = settings.world_size > 1 and not settings.ring
    return float(settings.caption_bytes * settings.global_batch * width) if gathers else 0.0


def fullest(moments: Sequence[Memory]) -> Memory:
    """Return the moment with the most bytes."""
    return max(moments, key=lambda moment: moment.total)


def moments(work: Work, settings: Settings, place: Place) -> list[Memory]:
    """Return a step's moments that may be the fullest: the peak of each phase."""
    rows, width = settings.rank_batch, work.embed_dim
    host = rows if place.on_cpu else settings.chunk  # a GPU holds one chunk's inputs
    inputs = float(work.hidden_bytes * rows + work.input_bytes * host)
    state = state_bytes(work, settings)
    grads = gradient_bytes(work, settings)
    acts = activation_bytes(work, settings)
    # Outputs of chunks without a graph wait for the second pass.
    waiting = FP32 * float(width) * max(0, rows - settings.kept * settings.chunk)
    waiting *= 2 + settings.negatives
    features, similarities = loss_bytes(settings, width, place)
    cache, prefetched = cache_bytes(settings, width), prefetched_bytes(settings, width)

    again = max(grads["gathering"], acts["second_pass"])
    at = partial(Memory, inputs=inputs, state=state)
    return [
        at("encode", 0.0, max(grads["gathering"], acts["encode"]), waiting + prefetched, 0.0),
        at("loss", 0.0, acts["loss"], waiting + features, similarities),
        # Gradients come as the graph goes: whole at the end of the first backward.
        at("second_pass", 0.0, acts["first_backward"], waiting + cache, 0.0),
        at("second_pass", grads["second_pass"], again, waiting + cache, 0.0),
        at("reduce", grads["reduce"], 0.0, cache, 0.0),
        at("step", grads["step"], 0.0, cache, 0.0),
    ]
