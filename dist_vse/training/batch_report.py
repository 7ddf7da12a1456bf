"""What a larger batch would be worth: two estimates from a step that is taken anyway.

The gradient's noise, by chunks (McCandlish et al., https://arxiv.org/abs/1812.06162), and the bias
of few negatives, from the features that are there. docs/explain/batch.md defines both. Neither
depends on the number of ranks, if the chunks are the same.

N pairs on all ranks, d embedding, n pairs of a smaller batch, k chunks on all ranks.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.engine import Engine
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.losses.distillation import DistilledLoss
from dist_vse.losses.global_loss import GlobalLoss, LossOutput
from dist_vse.losses.layout import Layout
from dist_vse.losses.nested import NestedLoss
from dist_vse.losses.registry import find_loss
from dist_vse.training.grad_cache import train_step
from dist_vse.training.prefetch_to_device import Chunk

MAX_DENSE = 2048  # pairs of a smaller batch: its similarities are one matrix
MIN_PAIRS = 8
DIVISORS = (2, 4, 8)  # smaller batches are N over these
DRAWS = 4  # partitions of the batch into smaller ones


class ChunkGradients:
    """The gradients that chunks give to the last layers of both heads."""

    def __init__(self, model: nn.Module) -> None:
        heads = [model.get_submodule(f"{name}.head") for name in ("image", "text")]
        self.weights = [w for w in map(_last_weight, heads) if w is not None]
        self.sums = [torch.zeros_like(w, dtype=torch.float64) for w in self.weights]
        self.squares = [0.0 * s.sum() for s in self.sums]
        self.counts = [0] * len(self.weights)

    def add(self, which: int, grad: Tensor) -> None:
        """Take a chunk's gradient of a weight."""
        grad = grad.detach().double()
        self.sums[which] += grad
        self.squares[which] = self.squares[which] + grad.square().sum()
        self.counts[which] += 1

    def noise(self, total: int) -> dict[str, float]:
        """Return the noise scale of a batch of `total` pairs, and the chunks it is made of.

        Every rank calls this. Empty where there are fewer than two chunks, or no head that learns.
        """
        ranks = distributed.world_size()
        chunks = sum(self.counts[:1])
        number = torch.tensor([float(chunks)], dtype=torch.float64)
        chunks = int(distributed.all_reduce_sum(number.to(distributed.device())).item())
        if chunks < 2 or not self.weights:
            return {}
        # A rank's gradient is W times its share of the global gradient: see GlobalLoss.
        whole = sum(
            (distributed.all_reduce_sum(s.clone()) / ranks).square().sum() for s in self.sums
        )
        squares = distributed.all_reduce_sum(torch.stack(self.squares).sum()) / ranks**2
        return noise_scale(float(squares) * chunks, float(whole), chunks, total)


def noise_scale(
    chunk_square: float, whole_square: float, chunks: int, total: int
) -> dict[str, float]:
    """Return McCandlish's simple noise scale, in pairs, of `chunks` equal parts of a batch.

    `chunk_square` is the mean squared norm of a chunk's own mean gradient, `whole_square` that of
    the batch's. Both estimates, of the noise and of the true gradient's square, are unbiased; the
    scale is left out where the latter is not above 0.
    """
    small = total / chunks
    noise = (chunk_square - whole_square) / (1 / small - 1 / total)
    signal = (total * whole_square - small * chunk_square) / (total - small)
    found = {"noise": noise, "signal": signal, "chunks": chunks}
    if signal > 0:
        scale = max(0.0, noise / signal)
        found |= {"noise_scale": scale, "batch_worth": worth(total, scale)}
    return found


@contextmanager
def watched_chunks(model: nn.Module) -> Iterator[ChunkGradients]:
    """Collect each chunk's gradients during the block."""
    found = ChunkGradients(model)
    hooks = [
        weight.register_hook(lambda grad, which=which: found.add(which, grad))
        for which, weight in enumerate(found.weights)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _last_weight(head: nn.Module) -> nn.Parameter | None:
    """Return the weight of a head's last linear layer, if it learns."""
    layers = [m for m in head.modules() if isinstance(m, nn.Linear)]
    weight = layers[-1].weight if layers else None
    return weight if isinstance(weight, nn.Parameter) and weight.requires_grad else None


class _Inputs(NamedTuple):
    images: Tensor
    texts: Tensor
    log_scale: Tensor
    bias: Tensor


class WatchedLoss:
    """A step's loss that keeps what it was called with."""

    def __init__(self, loss: GlobalLoss | NestedLoss | DistilledLoss) -> None:
        self.loss = loss
        self.whole = loss if isinstance(loss, GlobalLoss) else loss.whole
        self.inputs: _Inputs | None = None

    def prefetch(self, text_features: Tensor) -> None:
        """Pass on; see GlobalLoss."""
        self.loss.prefetch(text_features)

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        negatives: Tensor | None = None,
    ) -> LossOutput:
        """Pass on; see GlobalLoss. The report is of the pairs alone, without negatives."""
        inputs = (image_features, text_features, log_scale, bias)
        self.inputs = _Inputs(*(x.detach().double() for x in inputs))
        return self.loss(image_features, text_features, log_scale, bias, negatives)

    def bias_of_few_negatives(self, seed: int) -> dict[str, float]:
        """Return the bias of smaller batches, `bias_of_n`, with its standard error.

        Every rank calls this, and all get the same; `seed` draws the smaller batches.
        """
        assert self.inputs is not None, "call it after the step"
        images, texts, log_scale, bias = self.inputs
        counts = distributed.all_gather_object(len(images))
        layout = Layout(tuple(counts), distributed.rank())
        pairs = _Inputs(layout.gather(images), layout.gather(texts), log_scale, bias)
        ids = layout.gather(self.whole.ids(len(images)).to(images.device))
        return negatives_bias(self.whole, pairs, ids, seed=seed)


def negatives_bias(loss: GlobalLoss, pairs: _Inputs, ids: Tensor, *, seed: int) -> dict[str, float]:
    """Return how far the expected gradient with n pairs a batch is from that with N.

    For partitions r of the batch into batches of n, G_r is the mean gradient in the features. The
    mean of <G_r - G, G_s - G> over r != s has the squared bias as its expectation: the noise of
    single draws falls out. The result is its root over |G|. Each rank computes a share of the
    batches.
    """
    total = len(pairs.images)
    sizes = [total // d for d in DIVISORS if total % d == 0]
    sizes = [n for n in sizes if MIN_PAIRS <= n <= MAX_DENSE]
    if not sizes or total > max(DIVISORS) * MAX_DENSE:
        return {}
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(total, generator=generator) for _ in range(DRAWS)]
    whole = _mean_gradient(loss, pairs, ids, [torch.arange(total)])
    size = whole.square().sum()
    found: dict[str, float] = {}
    for n in sizes:
        off = [_mean_gradient(loss, pairs, ids, order.split(n)) - whole for order in orders]
        products = torch.stack([x.flatten() for x in off])
        gram = products @ products.T / size  # (r, r)
        mean, error = _pair_mean(gram)
        found[f"bias_of_{n}"] = math.copysign(math.sqrt(abs(mean)), mean)
        found[f"bias_of_{n}_error"] = (
            error / (2 * math.sqrt(abs(mean))) if mean else math.sqrt(error)
        )
    return found


def _pair_mean(gram: Tensor) -> tuple[float, float]:
    """Return the mean of a Gram matrix off the diagonal, and its jackknife standard error."""
    draws = len(gram)
    off = gram.clone().fill_diagonal_(0)
    mean = off.sum() / (draws * (draws - 1))
    without = (off.sum() - 2 * off.sum(1)) / ((draws - 1) * (draws - 2))
    spread = (without - without.mean()).square().sum() * (draws - 1) / draws
    return mean.item(), spread.sqrt().item()


def _mean_gradient(
    loss: GlobalLoss, pairs: _Inputs, ids: Tensor, batches: list[Tensor] | tuple[Tensor, ...]
) -> Tensor:
    """Return N times the gradient (2, N, d) of the mean loss of the batches, over all ranks."""
    leaves = [x.clone().requires_grad_() for x in (pairs.images, pairs.texts)]
    names = ("image_ids", "text_ids")[: ids.shape[1]]
    total = (leaves[0].sum() + leaves[1].sum()) * 0  # this rank may have no batch
    for rows in batches[distributed.rank() :: distributed.world_size()]:
        rows = rows.to(ids.device)
        one = dense_loss(
            loss.name,
            leaves[0][rows],
            leaves[1][rows],
            pairs.log_scale,
            pairs.bias,
            loss.options,
            **{name: column[rows] for name, column in zip(names, ids.T, strict=True)},
        )
        # A sum over pairs (VSE++) is as large as the batch; a mean counts each batch alike.
        total = total + one.sum() * (1.0 if _is_sum(loss.name) else len(rows))
    return distributed.all_reduce_sum(torch.stack(torch.autograd.grad(total, leaves)))


def _is_sum(name: str) -> bool:
    """Return whether a loss is a sum over the pairs, and no mean."""
    spec, scale = find_loss(name), torch.ones(1)
    return float(spec.loss_unit(scale, 1)) == float(spec.loss_unit(scale, 2))


def reported_step(
    engine: Engine,
    loss: GlobalLoss | NestedLoss | DistilledLoss,
    chunks: Sequence[Chunk],
    *,
    keep_graphs: int,
    seed: int,
) -> tuple[LossOutput, dict[str, float]]:
    """Take a train step; return its output, and what a larger batch would be worth.

    Every rank calls this. The step itself is the same as without the report.
    """
    watched = WatchedLoss(loss)
    with watched_chunks(engine.module) as found:
        output = train_step(engine, watched, chunks, keep_graphs=keep_graphs)
    assert watched.inputs is not None
    rows = torch.tensor([float(len(watched.inputs.images))], device=distributed.device())
    total = int(distributed.all_reduce_sum(rows).item())
    return output, {**found.noise(total), **watched.bias_of_few_negatives(seed)}


def worth(total: int, scale: float) -> float:
    """Return what a step gains, of what it would gain with endlessly many pairs.

    1 / (1 + scale / N), of McCandlish et al.: at the noise scale, half.
    """
    return total / (total + scale)
