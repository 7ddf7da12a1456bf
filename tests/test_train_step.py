"""The train step equals one process with the whole batch and plain autograd, on every path."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.contrast import global_loss
from dist_vse.engine import Engine
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.engine.zero import ZeroEngine
from dist_vse.errors import UserError
from dist_vse.grad_cache import Chunk, LossFn, train_step
from dist_vse.losses import dense_loss
from dist_vse.models.dual_encoder import DualEncoder
from tests.distributed import run_distributed
from tests.tiny import tiny_batch, tiny_model

B = 16  # pairs in the global batch
STEPS = 3
RATE = 0.05  # SGD: Adam would hide a wrong scale
LOSSES = ("convse", "convse++")
CHUNKS = (1, 2, 4)


def _sgd(model: DualEncoder) -> torch.optim.Optimizer:
    return build_optimizer(
        model, name="sgd", lr=RATE, weight_decay=0.0, betas=(0.9, 0.999), momentum=0.0
    )


def _parameters(model: DualEncoder) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _reference(loss_name: str, clip_norm: float = 0.0) -> tuple[Tensor, Tensor]:
    """Train in one process with plain autograd; return the parameters before and after."""
    model = tiny_model()
    before, optimizer = _parameters(model), _sgd(model)
    for step in range(STEPS):
        images, tokens = tiny_batch(B, step)
        loss = dense_loss(loss_name, *model(**model.prepare(images=images, tokens=tokens)))
        optimizer.zero_grad()
        loss.backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    return before, _parameters(model)


def _loss(name: str) -> LossFn:
    return lambda images, texts, log_scale, bias: (
        global_loss(name, images, texts, log_scale, bias, margin=0.2).loss
    )


def _rank_chunks(model: DualEncoder, step: int, num_chunks: int) -> list[Chunk]:
    rank, rows = distributed.rank(), B // distributed.world_size()
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, step))
    pieces = zip(images.chunk(num_chunks), tokens.chunk(num_chunks), strict=True)
    return [model.prepare(images=i, tokens=t) for i, t in pieces]


def _engine(stage: int | None, clip_norm: float = 0.0, coalesce: bool = True) -> Engine:
    model = tiny_model()
    if stage is None:
        return PlainEngine(model, _sgd(model), clip_norm)
    rows = B // distributed.world_size()
    return ZeroEngine(
        model,
        _sgd(model),
        stage=stage,
        rank_batch_size=rows,
        clip_norm=clip_norm,
        coalesce=coalesce,
    )


def _error(engine: Engine, loss_name: str, num_chunks: int, clip_norm: float = 0.0) -> float:
    """Train STEPS steps; return |difference| / |movement| of the parameters to one process."""
    before, expected = _reference(loss_name, clip_norm)
    for step in range(STEPS):
        train_step(engine, _loss(loss_name), _rank_chunks(engine.module, step, num_chunks))
    if isinstance(engine, ZeroEngine):
        with engine.whole_parameters():
            found = _parameters(engine.module)
    else:
        found = _parameters(engine.module)
    return ((found - expected).norm() / (expected - before).norm()).item()


def _errors_of_the_grid() -> dict[tuple[Any, ...], float]:
    errors = {}
    for stage, loss_name, num_chunks in itertools.product((None, 0, 1, 2, 3), LOSSES, CHUNKS):
        if num_chunks <= B // distributed.world_size():
            errors[stage, loss_name, num_chunks] = _error(_engine(stage), loss_name, num_chunks)
    for stage in (2, 3):
        errors["every chunk reduced", stage] = _error(_engine(stage, coalesce=False), "convse", 4)
    for stage in (None, 0, 1, 2, 3):
        errors["clipped", stage] = _error(_engine(stage, 0.1), "convse", 2, 0.1)
    return errors


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parameters_equal_one_process_with_the_whole_batch(world_size: int) -> None:
    for errors in run_distributed(_errors_of_the_grid, world_size, timeout=280):
        wrong = {case: error for case, error in errors.items() if not error < 1e-5}
        assert not wrong
        assert len(errors) == 5 * 2 * 3 + 2 + 5


class _Recording:
    """An engine that keeps what the model gave in each forward."""

    def __init__(self, engine: PlainEngine) -> None:
        self.engine, self.module, self.outputs = engine, engine.module, list[Tensor]()

    def __call__(self, **inputs: Tensor) -> Any:
        outputs = self.engine(**inputs)
        self.outputs.append(outputs[0].detach().clone())
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def test_both_passes_draw_the_same_dropout_and_chunks_draw_different_ones() -> None:
    model = tiny_model(dropout=0.3)
    engine = _Recording(PlainEngine(model, _sgd(model)))
    torch.manual_seed(1)
    images, tokens = tiny_batch(4, 0)
    chunk = model.prepare(images=images, tokens=tokens)
    train_step(engine, _loss("convse"), [chunk, chunk, chunk])
    first, second, kept, *again = engine.outputs
    assert not torch.equal(first, second) and not torch.equal(second, kept)
    assert len(again) == 2  # the last chunk kept its graph
    assert torch.equal(again[0], second) and torch.equal(again[1], first)


def test_the_random_state_moves_on_between_steps() -> None:
    model = tiny_model(dropout=0.3)
    engine = PlainEngine(model, _sgd(model))
    images, tokens = tiny_batch(4, 0)
    chunk = model.prepare(images=images, tokens=tokens)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train_step(engine, _loss("convse"), [chunk, chunk])
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("keep_graphs", [0, 1, 2, 4])
def test_kept_graphs_do_not_change_the_numbers(keep_graphs: int) -> None:
    before, expected = _reference("convse")
    model = tiny_model()
    engine = PlainEngine(model, _sgd(model))
    for step in range(STEPS):
        chunks = _rank_chunks(model, step, 4)
        train_step(engine, _loss("convse"), chunks, keep_graphs=keep_graphs)
    assert (_parameters(model) - expected).norm() < 1e-5 * (expected - before).norm()


def test_a_loss_that_is_not_finite_updates_nothing() -> None:
    model = tiny_model()
    engine = PlainEngine(model, _sgd(model))
    before = _parameters(model)
    chunk = _rank_chunks(model, 0, 1)
    with pytest.raises(UserError, match="the loss is nan: nothing was updated"):
        train_step(engine, lambda i, *_: i.sum() * float("nan"), chunk)
    assert torch.equal(before, _parameters(model))
