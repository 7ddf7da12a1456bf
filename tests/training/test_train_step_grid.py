"""The train step equals one process with the whole batch and plain autograd, on every path.

One group of processes runs all cases of its size, and one engine all cases of its stage: each case
loads the initial weights again.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dist_vse import distributed
from dist_vse.config import OptimConfig
from dist_vse.engine import Engine, RunEngine, gradient_reduction, zero
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.losses.kernel_choice import choose_kernels
from dist_vse.losses.options import LossOptions
from dist_vse.losses.registry import find_loss
from dist_vse.models.build import build_head
from dist_vse.models.dual_encoder import DualEncoder, Tower
from dist_vse.models.image import ImageTrunk
from dist_vse.models.text import TransformerTrunk
from dist_vse.training.grad_cache import train_step
from dist_vse.training.prefetch_to_device import Chunk
from tests.support.distributed import run_distributed
from tests.support.engines import FSDP2, build
from tests.support.tiny import VOCABULARY, tiny_batch

B = 32  # pairs in the global batch
STEPS = 3
RATE = 0.05  # SGD: Adam would hide a wrong scale
LOSSES = ("convse", "convse++")
CHUNKS = (1, 2, 4, 8)
STAGES = (None, 0, 1, 2, 3, FSDP2 + 3)  # None is the plain engine
CLIP = 0.1


def _model() -> DualEncoder:
    """Build the smallest model that has both towers' parts; equal weights every time."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    image = ImageTrunk(vit, dim=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    text = TransformerTrunk(
        vocab_size=VOCABULARY, pad_id=0, max_tokens=8, width=64, depth=1, dropout=0.0,
        grad_checkpointing=False,
    )  # fmt: skip
    return DualEncoder(
        Tower(image, build_head(32, 16, 24, 0.0), frozen=False),
        Tower(text, build_head(64, 16, 24, 0.0), frozen=False),
        temperature=0.1,
        learn_temperature=True,
        bias=-10.0,
        learn_bias=False,
    )


def _sgd(model: DualEncoder) -> torch.optim.Optimizer:
    return build_optimizer(model, OptimConfig(name="sgd", lr=RATE, weight_decay=0.0))


def _engine(stage: int | None, clip_norm: float = 0.0, coalesce: bool = True) -> Engine:
    model = _model()
    if stage is None:
        return PlainEngine(model, _sgd(model), clip_norm)
    sgd = _sgd(model)
    return build(model, sgd, stage, batch_size=B, clip_norm=clip_norm, coalesce=coalesce)


def _parameters(model: DualEncoder) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@functools.cache
def _reference(loss_name: str, clip_norm: float = 0.0) -> tuple[Tensor, Tensor]:
    """Train in one process with plain autograd; return the parameters before and after."""
    model = _model()
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


def _rank_chunks(model: DualEncoder, seed: int, num_chunks: int) -> list[Chunk]:
    rank, rows = distributed.rank(), B // distributed.world_size()
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, seed))
    pieces = zip(images.chunk(num_chunks), tokens.chunk(num_chunks), strict=True)
    return [model.prepare(images=i, tokens=t) for i, t in pieces]


def _error(
    engine: Engine,
    loss_name: str,
    num_chunks: int,
    kept: int,
    clip_norm: float = 0.0,
    kernels: str = "auto",
) -> float:
    """Train STEPS steps; return |difference| / |movement| of the parameters to one process."""
    before, expected = _reference(loss_name, clip_norm)
    for step in range(STEPS):
        chunks = _rank_chunks(engine.module, step, num_chunks)
        loss = GlobalLoss(loss_name, LossOptions(kernels=kernels))
        train_step(engine, loss, chunks, keep_graphs=kept)
    if isinstance(engine, PlainEngine):
        found = _parameters(engine.module)
    else:
        with cast(RunEngine, engine).gathered_parameters() as model:
            found = _parameters(model)
    return float((found - expected).norm() / (expected - before).norm())


def _cases() -> Iterator[tuple[str, int, int]]:
    for loss_name, num_chunks in itertools.product(LOSSES, CHUNKS):
        for kept in sorted({0, num_chunks // 2, num_chunks}):
            yield loss_name, num_chunks, kept


def _errors_of_the_grid(
    stages: tuple[int | None, ...], cases: list[tuple[str, int, int]]
) -> dict[tuple[Any, ...], float]:
    # With no parameter kept whole, ZeRO 3 gathers and drops each of them at every module.
    zero.PERSISTENT = 0 if distributed.world_size() < 4 else zero.PERSISTENT
    gradient_reduction.BUCKET = 2_000  # elements, so that there are many buckets
    errors: dict[tuple[Any, ...], float] = {}
    for stage in stages:
        engine, start = _engine(stage), _model().state_dict()
        for case in cases:
            if isinstance(engine, PlainEngine):
                engine.module.load_state_dict(start)
            else:
                cast(RunEngine, engine).load(start, [])  # SGD has no state
            errors[(stage, *case)] = _error(engine, *case)
    return errors


def _errors_beside_the_grid() -> dict[tuple[Any, ...], float]:
    errors: dict[tuple[Any, ...], float] = {}
    of_fsdp2 = (FSDP2 + 2, 3), (FSDP2 + 3, 0), (FSDP2 + 3, 4)
    for stage, kept in ((1, 2), (2, 0), (2, 2), (3, 0), (3, 1), *of_fsdp2):
        engine = _engine(stage, coalesce=False)
        errors["every chunk reduced", stage, kept] = _error(engine, "convse", 4, kept)
    for stage in (*STAGES, FSDP2 + 2):
        engine = _engine(stage, CLIP)
        errors["clipped", stage] = _error(engine, "convse", 4, 2, CLIP)
    return errors


def _errors_of_fused_kernels() -> dict[tuple[Any, ...], float]:
    """Run the losses in the fused kernels, and only in them."""
    has_kernels = all(find_loss(name).fused is not None for name in LOSSES)
    assert choose_kernels("fused", has_kernels, torch.float32, distributed.device())[0] == "fused"
    return {
        (stage, loss_name, num_chunks, kept): _error(
            _engine(stage), loss_name, num_chunks, kept, kernels="fused"
        )
        for stage, loss_name, num_chunks, kept in (
            (None, "convse", 4, 2),
            (1, "convse++", 4, 0),
            (2, "convse", 1, 1),
            (3, "convse", 2, 1),
        )
    }


def test_some_cases_equal_one_process_with_the_whole_batch() -> None:
    cases = [("convse", 4, 1), ("convse++", 1, 1)]
    for errors in run_distributed(_errors_of_the_grid, 2, (None, 1, 3, FSDP2 + 3), cases):
        assert not {case: error for case, error in errors.items() if not error < 1e-5}
        assert len(errors) == 4 * 2


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parameters_equal_one_process_with_the_whole_batch(world_size: int) -> None:
    for errors in run_distributed(
        _errors_of_the_grid, world_size, STAGES, [*_cases()], timeout=380
    ):
        assert not {case: error for case, error in errors.items() if not error < 1e-5}
        assert len(errors) == len(STAGES) * len(LOSSES) * (2 + 3 * 3)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_so_do_clipping_and_a_reduction_at_every_chunk() -> None:
    for errors in run_distributed(_errors_beside_the_grid, 2, timeout=180):
        assert not {case: error for case, error in errors.items() if not error < 1e-5}
        assert len(errors) == 8 + 7


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_so_do_fused_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: the fused kernels are NOT tried")
    for errors in run_distributed(_errors_of_fused_kernels, 2, timeout=180):
        assert not {case: error for case, error in errors.items() if not error < 1e-5}
        assert len(errors) == 4
