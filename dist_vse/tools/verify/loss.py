"""The loss over the ranks as the config has it, given features in float64."""

from dataclasses import replace

from torch import Tensor

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.losses.tiles import default_tile
from dist_vse.tools.verify.case import (
    WIDTH,
    make_batch,
    make_features,
    negatives_of,
    part_of,
    small_widths,
)
from dist_vse.tools.verify.reference import (
    MIN_TOLERANCE,
    ROUNDING,
    build_dense_loss,
    gradients,
    samples_seen,
)
from dist_vse.tools.verify.table import Row, compare, relative_error
from dist_vse.training.step_loss import build_loss, has_bf16_products

MAX_TILE = 4096
NAMES = (
    "value",
    "gradient of image features",
    "gradient of text features",
    "gradient of temperature",
    "gradient of bias",
    "gradient of negatives",
)


def check_loss(config: TrainConfig) -> list[Row]:
    """Compare value and gradients with those of one process; rank 0's rows count.

    More pairs than a tile is wide, so that tiles meet; then 10 pairs on ranks of uneven sizes.
    """
    world_size = distributed.world_size()
    # The dense reference in float64 bounds how large they may be.
    even = -(-(min(MAX_TILE, default_tile(distributed.device())) * 5 // 4) // world_size)
    uneven = ragged_counts(world_size)
    shown = ", ".join(str(count) for count in uneven)
    return [
        *_check(config, [even] * world_size, f"loss alone, {even} pairs a rank, float64"),
        *_check(config, uneven, f"loss alone, {shown} pairs on the ranks"),
    ]


def ragged_counts(world_size: int) -> list[int]:
    """Share 10 pairs out unevenly: 7, 3, and none on further ranks."""
    return [10] if world_size == 1 else [7, 3] + [0] * (world_size - 2)


def _check(config: TrainConfig, counts: list[int], section: str) -> list[Row]:
    config = replace(config, loss=replace(config.loss, widths=small_widths(config, WIDTH)))
    per_pair = config.data.negatives
    batch = make_batch(sum(counts), negatives=per_pair, teacher=config.loss.teacher is not None)
    images, texts, *negatives = make_features(sum(counts), negatives=per_pair)
    scale = images.new_tensor([1 / config.loss.temperature]).log()
    whole = [images, texts, scale, images.new_tensor([config.loss.bias]), *negatives]
    start = sum(counts[: distributed.rank()])
    rows = slice(start, start + counts[distributed.rank()])

    step_loss = build_loss(config, part_of(batch, rows), samples_seen(config), max_tile=MAX_TILE)
    of_rows = negatives_of(rows, per_pair)
    leaves = [images[rows], texts[rows], *whole[2:4], *(x[of_rows] for x in negatives)]
    loss, grads = gradients(lambda *x: step_loss(*x).loss, leaves)
    found = [distributed.all_reduce_mean(loss.clone()), *_join(grads)]
    value, grads = gradients(build_dense_loss(config, batch), whole)
    exact = [value, *grads]
    value, grads = gradients(build_dense_loss(config, batch, rounded=True), whole)
    rounded = [value, *grads]
    minimum = MIN_TOLERANCE["bf16" if has_bf16_products(config) else "float64"]
    result = []
    for name, ours, right, plain in zip(NAMES, found, exact, rounded, strict=False):
        if right is None or plain is None:
            continue  # the loss does not depend on it
        assert ours is not None, name
        tolerance = max(minimum, ROUNDING * relative_error(plain, right))
        result.append(compare(section, name, ours, right, tolerance))
    return result


def _join(grads: list[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients of the whole batch: an engine's mean over the ranks does the same."""
    world_size = distributed.world_size()
    features, scalars, negatives = grads[:2], grads[2:4], grads[4:]
    return [
        *(distributed.all_gather_rows(_known(x)) / world_size for x in features),
        *(None if x is None else distributed.all_reduce_mean(x.clone()) for x in scalars),
        *(distributed.all_gather_rows(_known(x)) / world_size for x in negatives),
    ]


def _known(grad: Tensor | None) -> Tensor:
    assert grad is not None, "every loss depends on the features"
    return grad
