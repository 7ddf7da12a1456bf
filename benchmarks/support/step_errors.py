"""How far the gradient of a peer's step, and of ours, is from that of one process in float64.

On a small model, under two or more ranks: the gradients that the optimizer is given.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.support.cache_peers import open_clip_step
from benchmarks.support.workload import Workload, make_model, make_pairs
from dist_vse import distributed
from dist_vse.engine.plain import PlainEngine
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.training.grad_cache import train_step

LOAD = Workload("test_vit", 32, text_width=64, text_depth=1, num_tokens=8, embedding=16)
ROWS = 2  # a chunk
PARTS = {"towers": ("image", "text"), "temperature": ("log_scale",)}
Gradients = dict[str, Tensor]


def step_errors(chunks: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return factor and error of the gradient, by trainer and number of chunks, and by part.

    Every rank calls this. A factor of 1 and an error of 1e-5 and less is exact.
    """
    # It calls collectives that PyTorch has renamed: nothing that a user can mend.
    warnings.filterwarnings("ignore", r"torch\.distributed\.nn\.functional\.\w+ is deprecated")
    exact = _exact(chunks)
    found: dict[str, Gradients] = {}
    for count in (1, chunks):
        found[f"OpenCLIP {count}"] = _peer(chunks, count)
        found[f"dist_vse {count}"] = _ours(chunks, count)
    return {
        name: {part: _compare(gradients, exact, part) for part in PARTS}
        for name, gradients in found.items()
    }


def _compare(found: Gradients, exact: Gradients, part: str) -> dict[str, float]:
    names = [name for name in exact if name.startswith(PARTS[part])]
    given, right = (
        torch.cat([g[name].double().flatten() for name in names]) for g in (found, exact)
    )
    square = right @ right
    error = (given - right).norm() / square.sqrt()
    return {"factor": float(given @ right / square), "error": float(error)}


def _exact(chunks: int) -> Gradients:
    pairs = distributed.all_gather_object(make_pairs(LOAD, ROWS * chunks))
    images, tokens = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    model = make_model(LOAD).double()
    loss = dense_loss("info_nce", *model(**model.prepare(images=images, tokens=tokens)))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def _peer(chunks: int, count: int) -> Gradients:
    model = make_model(LOAD)
    with _given_to_optimizer(model) as (optimizer, gradients):
        step = open_clip_step(model, optimizer, make_pairs(LOAD, ROWS * chunks), count)
        assert step is not None, "the caller has looked for it"
        step()
    return gradients


def _ours(chunks: int, count: int) -> Gradients:
    model = make_model(LOAD)
    pieces = zip(*(x.chunk(count) for x in make_pairs(LOAD, ROWS * chunks)), strict=True)
    with _given_to_optimizer(model) as (optimizer, gradients):
        inputs = [model.prepare(images=images, tokens=tokens) for images, tokens in pieces]
        train_step(PlainEngine(model, optimizer), GlobalLoss("info_nce"), inputs)
    return gradients


@contextmanager
def _given_to_optimizer(model: nn.Module) -> Iterator[tuple[torch.optim.Optimizer, Gradients]]:
    """Give an optimizer, and a dictionary that its step fills with the gradients."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(named.values(), lr=0.0)
    gradients: Gradients = {}

    def keep(*_: Any) -> None:
        gradients.update({n: p.grad.clone() for n, p in named.items() if p.grad is not None})

    hook = optimizer.register_step_pre_hook(keep)
    yield optimizer, gradients
    hook.remove()
