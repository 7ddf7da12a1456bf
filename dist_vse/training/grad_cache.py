"""The train step: gradient caching with the exact gradient of the global batch.

Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021,
https://arxiv.org/abs/2101.06983. Here the learned temperature and bias are cached outputs like
the features, so that no parameter is touched outside the engine; and the last chunks may keep
their graphs from the first pass, so that only the others are encoded twice.

Shape letters: b rows on this rank, d embedding size, k chunks, c = b / k rows of one.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from dist_vse.common import step_timer
from dist_vse.common.errors import UserError
from dist_vse.common.random_state import (
    Generator,
    RandomState,
    own_generators,
    random_state,
    replay,
    restore,
)
from dist_vse.distributed import all_reduce_mean
from dist_vse.engine import Engine
from dist_vse.losses.global_loss import LossOutput
from dist_vse.models.dual_encoder import frozen_statistics
from dist_vse.training.prefetch_to_device import Chunk, prefetch_to_device


class Loss(Protocol):
    """The loss of one step, such as a GlobalLoss."""

    def prefetch(self, text_features: Tensor) -> None:
        """Take a chunk's text features (c, d) before the next chunk is encoded."""

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        negatives: Tensor | None = None,
    ) -> LossOutput:
        """Return the rank's loss: features (b, d), log_scale and bias (1,).

        Features (m, d) of negatives come last, where the batch has such texts.
        """


class _Encoded(NamedTuple):
    """A chunk after the first pass: its outputs, with their graph or with what repeats them."""

    outputs: tuple[Tensor, ...]  # (c, d), (c, d), then (1,) each, then negatives if any
    state: RandomState
    has_graph: bool


def train_step(
    engine: Engine,
    loss: Loss,
    chunks: Sequence[Chunk],
    *,
    keep_graphs: int = 1,
) -> LossOutput:
    """Step as if the global batch had been one forward and one backward.

    `keep_graphs` chunks keep their activations from the first pass to the second. One of them
    costs no memory at the peak, since the second pass holds one chunk's graph anyway; with one
    chunk it makes the step an ordinary one.

    Returns the global loss (the mean over the ranks) and the batch's statistics. Raises UserError
    on every rank, before anything is updated, if the loss or a gradient is not finite; in a
    float16 run such a gradient skips the update instead.
    """
    graphs = min(keep_graphs, len(chunks))
    assert engine.max_live_graphs is None or graphs <= engine.max_live_graphs, (
        f"keep_graphs={graphs}"
    )

    # Pass 1: embeddings only, with a graph where it is kept.
    step_timer.begin("encode")
    first_kept = len(chunks) - graphs
    generators = own_generators(engine.module)
    here = next(engine.module.parameters()).device
    encoded: list[_Encoded] = []
    for i, chunk in enumerate(prefetch_to_device(chunks, here)):
        step_timer.begin("encode")  # a mark a chunk shows whether a GPU waits for the host
        encoded.append(_encode(engine, chunk, generators, keep_graph=i >= first_kept))
        loss.prefetch(encoded[i].outputs[1])

    step_timer.begin("loss")
    output, cache = _gradients_of_outputs(loss, encoded)

    # Pass 2: <output, cached gradient> has the gradient of the loss in the parameters. Kept
    # graphs go first, so that their memory is free for the others. BatchNorm's statistics have
    # moved in pass 1, once.
    step_timer.begin("second_pass")
    again = prefetch_to_device(reversed(chunks[:first_kept]), here)
    with engine.accumulation(), frozen_statistics(engine.module):
        for i in reversed(range(len(chunks))):
            step_timer.begin("second_pass")
            outputs = _outputs(engine, encoded[i], again)
            surrogate = sum((o * g).sum() for o, g in zip(outputs, cache[i], strict=True))
            assert isinstance(surrogate, Tensor)
            encoded[i] = encoded[i]._replace(outputs=())
            engine.backward(surrogate, last=i == 0)
    step_timer.begin("step")
    _update(engine, output.loss)
    step_timer.begin(step_timer.OTHER)
    return output


def _gradients_of_outputs(
    loss: Loss, encoded: Sequence[_Encoded]
) -> tuple[LossOutput, list[tuple[Tensor, ...]]]:
    """Return the global loss and the cache: each chunk's gradients in its outputs.

    autograd.grad, not backward: it reaches no parameter and so fires no engine hook.
    """
    columns = zip(*(chunk.outputs for chunk in encoded), strict=True)
    leaves = [torch.cat([part.detach() for part in c]).requires_grad_() for c in columns]
    images, texts, log_scale, bias, *negatives = leaves  # (b, d), (b, d), (k,), (k,), (m, d)
    output = loss(images, texts, log_scale.mean(0, True), bias.mean(0, True), *negatives)
    mean_loss = all_reduce_mean(output.loss.detach().clone())
    grads = torch.autograd.grad(output.loss, leaves, allow_unused=True, materialize_grads=True)
    # Constants: PyTorch 2.8 lets the zeros of what took no part require a gradient.
    by_output = (_split_like(grad.detach(), encoded, i) for i, grad in enumerate(grads))
    return output._replace(loss=mean_loss), list(zip(*by_output, strict=True))


def _update(engine: Engine, loss: Tensor) -> None:
    """Update by the gradients, or skip the step if they are too large for a float16 run.

    Raises UserError if the loss, or a gradient in another precision, is not finite. All ranks do
    the same. The host waits for the device here, where all work is under way.
    """
    finite = engine.all_finite().to(loss.dtype)
    value, are_finite = torch.stack([loss, finite]).tolist()
    if not math.isfinite(value):
        raise UserError(
            f"the loss is {value}: nothing was updated; lower optim.lr, set optim.clip_norm, or "
            "raise loss.temperature"
        )
    scale = engine.loss_scale
    if are_finite:
        engine.step()
        if scale is not None:
            scale.grow()
    elif scale is not None:
        engine.skip()
        scale.back_off()
    else:
        raise UserError(
            f"the loss is {value:.6g}, but a gradient is infinite or NaN: nothing was updated; "
            "lower optim.lr, or look for a division by 0 or a root of 0 in an encoder"
        )


def _encode(
    engine: Engine, chunk: Chunk, generators: Sequence[Generator], *, keep_graph: bool
) -> _Encoded:
    state = random_state(generators)
    restore(state)  # as the second pass will, which matters to cuDNN
    with torch.set_grad_enabled(keep_graph):
        return _Encoded(engine(**chunk), state, keep_graph)


def _outputs(engine: Engine, first: _Encoded, again: Iterator[Chunk]) -> tuple[Tensor, ...]:
    """Return outputs that have a graph: the kept ones, or the next chunk's with equal dropout."""
    if first.has_graph:
        return first.outputs
    chunk = next(again)
    with replay(first.state):
        return cast(tuple[Tensor, ...], engine(**chunk))


def _split_like(grad: Tensor, encoded: Sequence[_Encoded], i: int) -> tuple[Tensor, ...]:
    return tuple(grad.split([len(chunk.outputs[i]) for chunk in encoded]))
