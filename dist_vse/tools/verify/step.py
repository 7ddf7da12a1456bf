"""One step of training with the config's chunks, precision and engine, on small towers."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.data.samples import Batch
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.precision import use_precision
from dist_vse.tools.verify.case import (
    kept_graphs,
    make_batch,
    num_chunks,
    part_of,
    shrink,
    small_model,
)
from dist_vse.tools.verify.reference import MIN_TOLERANCE, ROUNDING, model_gradients, samples_seen
from dist_vse.tools.verify.table import Row, compare, relative_error
from dist_vse.training.build_engine import build_engine
from dist_vse.training.chunks import make_chunks
from dist_vse.training.grad_cache import train_step
from dist_vse.training.step_loss import build_loss, has_bf16_products

PARTS = {
    "movement of image trunk": "image.trunk.",
    "movement of image head": "image.head.",
    "movement of text trunk": "text.trunk.",
    "movement of text head": "text.head.",
    "movement of temperature": "log_scale",
    "movement of bias": "bias",
}


def check_step(config: TrainConfig) -> list[Row]:
    """Compare the loss, and how every part of the model moves, with one process.

    SGD moves the parameters by the gradient times the rate. With `optim.clip_norm` the gradient
    is clipped, to half of its length.
    """
    frozen = config.model.image.all_frozen, config.model.text.all_frozen
    small = shrink(config, distributed.world_size())
    use_precision(distributed.device(), small.engine.precision)
    batch = make_batch(
        small.global_batch_size,
        negatives=small.data.negatives,
        teacher=small.loss.teacher is not None,
    )

    model = small_model(small, frozen=frozen).double()
    before = _copy(model)
    exact_loss, gradient = model_gradients(small, model, batch)
    length = _length(gradient)
    # They move by about their own length: float32 then shows many digits of the movement.
    rate = _length({name: before[name] for name in gradient}) / length
    exact = {name: -rate * grad.cpu() for name, grad in gradient.items()}

    # What rounding alone does: one process in the precision of the run.
    model = small_model(small, frozen=frozen)
    rounded_loss, gradient = model_gradients(small, model, batch, rounded=True)
    moved = {n: p - rate * gradient[n] for n, p in model.named_parameters() if n in gradient}
    rounded = _movement(before, moved)

    clip_norm = length / 2 if small.optim.clip_norm else 0.0
    optim = replace(small.optim, lr=rate * (2 if clip_norm else 1), clip_norm=clip_norm)
    found_loss, after = _take_step(replace(small, optim=optim), batch, frozen)
    found = _movement(before, after)

    section = _describe(config, small)
    minimum = MIN_TOLERANCE["bf16" if has_bf16_products(small) else small.engine.precision]
    tolerance = max(minimum, ROUNDING * relative_error(rounded_loss, exact_loss))
    rows = [compare(section, "loss", found_loss, exact_loss, tolerance)]
    for part, prefix in PARTS.items():
        names = [name for name in exact if name.startswith(prefix)]
        if not names:
            continue  # frozen, or not learned
        ours, right, plain, start = (
            torch.cat([tensors[name].reshape(-1) for name in names])
            for tensors in (found, exact, rounded, before)
        )
        digits = torch.finfo(torch.float32).eps * float(start.norm() / right.norm())
        noise = max(digits, relative_error(plain, right))
        rows.append(compare(section, part, ours, right, max(minimum, ROUNDING * noise)))
    return rows


def _take_step(
    config: TrainConfig, batch: Batch, frozen: tuple[bool, bool]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Train for one step as `dist_vse.train` does; return the loss and the whole parameters."""
    engine = build_engine(config, small_model(config, frozen=frozen))
    engine.set_learning_rate(config.optim.lr)
    count = config.global_batch_size // distributed.world_size()
    start = count * distributed.rank()
    share = part_of(batch, slice(start, start + count))
    chunks = make_chunks(engine.module, share, config)

    def step() -> Tensor:
        loss = build_loss(config, share, samples_seen(config))
        return train_step(engine, loss, chunks, keep_graphs=kept_graphs(config)).loss

    value = step()
    while engine.loss_scale is not None and not engine.loss_scale.steps:  # it was skipped
        value = step()
    with engine.gathered_parameters() as model:
        return value, _copy(model)


def _copy(model: DualEncoder) -> dict[str, Tensor]:
    return {name: _exactly(p) for name, p in model.named_parameters()}


def _exactly(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64, copy=True)


def _movement(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _exactly(x) - before[name] for name, x in after.items()}


def _length(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.cat([x.reshape(-1) for x in tensors.values()]).norm())


def _describe(config: TrainConfig, small: TrainConfig) -> str:
    world_size = distributed.world_size()
    chunks, wanted = (num_chunks(each, world_size) for each in (small, config))
    fewer = f" (the config: {wanted})" if chunks != wanted else ""
    clipped = ", clipped" if small.optim.clip_norm else ""
    return (
        f"a step, {small.engine.title}, {chunks} chunks a rank{fewer}, "
        f"{small.engine.precision}{clipped}"
    )
