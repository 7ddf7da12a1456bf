"""Gradient caching for a model and a training loop of your own.

b rows on this rank, c rows of a chunk, d embedding.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.common.uncompiled import uncompiled
from dist_vse.engine.wrapped import Sync, WrappedModel
from dist_vse.losses.module import GlobalContrastiveLoss, StepLoss
from dist_vse.models.precision import at_least_float32
from dist_vse.training.grad_cache import train_step

Forward = Callable[[Any, Any], Any]
"""(model, a chunk of the batch) -> its features, and the model's own logit_scale and logit_bias."""

_KEYS = (("image_features", "text_features"), ("image_embeds", "text_embeds"))


# More than eight parameters: five are seams to loops of many kinds, which most leave out.
@uncompiled
def cached_step(
    model: nn.Module,
    loss: GlobalContrastiveLoss,
    batch: Any,
    *,
    chunk_size: int,
    forward: Forward | None = None,
    backward: Callable[[Tensor], None] | None = None,
    sync: Sync | None = None,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
) -> Tensor:
    """Put the gradients of the global batch's loss into `.grad`, with `chunk_size` pairs at a time.

    It takes the place of forward, loss and backward; your optimizer's step comes after it. Returns
    the global loss, detached. Memory is that of one chunk, dropout is drawn once, and gradients
    are reduced once, in the backward of the last chunk.

    - `model` is your model as DDP, FSDP2 (`fully_shard`), DeepSpeed or `accelerator.prepare` gave
      it back; the bare model in one process.
    - `batch` holds this rank's b pairs: a tensor, or a mapping or sequence (nested, if need be)
      whose tensors have b rows each. The ranks' b may differ under DDP.
    - `forward(model, chunk)` returns features (c, d) twice, of unit length, then, if the model has
      them, its logit_scale (1/t) and logit_bias; or a mapping with such names, as OpenCLIP's
      models. By default the model is called with the chunk's items.
    - `backward` replaces `loss.backward()`, for a gradient scaler, say.
    - `sync(last)` is the block of a chunk's forward and backward, for a wrapper that is unknown
      here: gradients are reduced where `last` is true.
    - Pairs that share an int64 id (b,) are no negatives of each other.

    Raises UserError where something does not fit, and if the loss is not finite.
    """
    if chunk_size < 1:
        raise UserError(f"chunk_size ({chunk_size}) must be at least 1")
    tensors = list(_tensors(batch))
    rows = {len(x) for x in tensors if x.ndim}
    if len(rows) != 1 or any(x.ndim == 0 for x in tensors):
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise UserError(f"the batch's tensors ({shapes}) must have one number of rows, the pairs'")
    chunks = [
        {f"x{i}": part for i, part in enumerate(parts)}
        for parts in zip(*(x.split(chunk_size) for x in tensors), strict=True)
    ]

    def encode(**parts: Tensor) -> tuple[Tensor, ...]:
        chunk = _with_tensors(batch, iter(parts.values()))
        return _outputs((forward or _call)(model, chunk), loss)

    engine = WrappedModel(model, encode, num_chunks=len(chunks), backward=backward, sync=sync)
    step_loss = StepLoss(loss, image_ids=image_ids, text_ids=text_ids)
    return train_step(engine, step_loss, chunks).loss


def _call(model: nn.Module, chunk: Any) -> Any:
    if isinstance(chunk, Mapping):
        return model(**chunk)
    return model(*chunk) if isinstance(chunk, tuple | list) else model(chunk)


def _outputs(output: Any, loss: GlobalContrastiveLoss) -> tuple[Tensor, ...]:
    """Return features (c, d) twice, then log_scale and bias (1,), all float32 at least.

    The cache is made of their gradients: in half precision these could underflow.
    """
    if isinstance(output, Mapping):
        features = next((names for names in _KEYS if names[0] in output), _KEYS[0])
        found = [output.get(name) for name in (*features, "logit_scale", "logit_bias")]
    else:
        found = list(output) if isinstance(output, tuple | list) else [output]
        found += [None] * (4 - len(found))
    if len(found) != 4 or not all(isinstance(x, Tensor) for x in found[:2]):
        kind = type(output).__name__
        raise UserError(
            f"the model returned {kind}, not two features and, at most, logit_scale and "
            "logit_bias; pass forward=lambda model, chunk: (image_features, text_features)"
        )
    log_scale, bias = loss.scalars()
    image_features, text_features, logit_scale, logit_bias = cast(list[Tensor], found)
    if logit_scale is not None:
        log_scale = at_least_float32(logit_scale).log().view(1)
    if logit_bias is not None:
        bias = at_least_float32(logit_bias).view(1)
    return at_least_float32(image_features), at_least_float32(text_features), log_scale, bias


def _tensors(nest: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nest of mappings and sequences."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping | list | tuple):
        for part in nest.values() if isinstance(nest, Mapping) else nest:
            yield from _tensors(part)


def _with_tensors(nest: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the nest with other tensors in the places of its own."""
    if isinstance(nest, Tensor):
        return next(tensors)
    if isinstance(nest, Mapping):
        return {name: _with_tensors(part, tensors) for name, part in nest.items()}
    if isinstance(nest, list | tuple):
        return tuple(_with_tensors(part, tensors) for part in nest)
    return nest
