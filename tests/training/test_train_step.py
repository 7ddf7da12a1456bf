"""The train step: equal dropout in both passes, one reduction a step, nothing silent."""

import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import EngineConfig, OptimConfig
from dist_vse.engine import Engine
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.engine.zero import ZeroEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.training import grad_cache
from dist_vse.training.grad_cache import train_step
from dist_vse.training.prefetch_to_device import Chunk
from tests.support.collectives import Collectives
from tests.support.distributed import run_distributed
from tests.support.loss_cases import Plain
from tests.support.tiny import tiny_batch, tiny_model

B = 16  # pairs in the global batch


def _sgd(model: DualEncoder) -> torch.optim.Optimizer:
    return build_optimizer(model, OptimConfig(name="sgd", lr=0.05, weight_decay=0.0))


def _parameters(model: DualEncoder) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _engine(stage: int | None, model: DualEncoder, **options: Any) -> Engine:
    if stage is None:
        return PlainEngine(model, _sgd(model))
    rows = B // distributed.world_size()
    return ZeroEngine(model, _sgd(model), EngineConfig(stage, **options), rank_batch_size=rows)


def _rank_chunks(model: DualEncoder, step: int, num_chunks: int) -> list[Chunk]:
    rank, rows = distributed.rank(), B // distributed.world_size()
    images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, step))
    pieces = zip(images.chunk(num_chunks), tokens.chunk(num_chunks), strict=True)
    return [model.prepare(images=i, tokens=t) for i, t in pieces]


class _Recording:
    """An engine that keeps what the model gave in each forward."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.outputs = engine, list[list[Tensor]]()

    def __call__(self, **inputs: Tensor) -> Any:
        outputs = self.engine(**inputs)
        self.outputs.append([output.detach().clone() for output in outputs])
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def _outputs_with_dropout(stage: int | None, keep_graphs: int, options: dict[str, Any]) -> Any:
    model = tiny_model(dropout=0.3)
    engine = _Recording(_engine(stage, model, **options))
    torch.manual_seed(1 + distributed.rank())
    chunk = _rank_chunks(model, 0, 4)[0]
    train_step(engine, GlobalLoss("convse"), [chunk] * 3, keep_graphs=keep_graphs)
    return engine.outputs


BF16 = {"precision": "bf16"}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world_size", "stage", "keep_graphs", "options"),
    [
        (1, None, 1, {}),
        (1, 1, 0, BF16),
        (2, 2, 0, {}),
        pytest.param(2, 3, 2, {}, marks=SLOW),
        pytest.param(2, 3, 0, BF16, marks=SLOW),
    ],
)
def test_both_passes_draw_the_same_dropout_and_chunks_draw_different_ones(
    world_size: int, stage: int | None, keep_graphs: int, options: dict[str, Any]
) -> None:
    cases = run_distributed(_outputs_with_dropout, world_size, stage, keep_graphs, options)
    for outputs in cases:
        first, again = outputs[:3], outputs[3:]
        for feature in (0, 1):  # of images, of captions
            drawn = [chunk[feature] for chunk in first]
            assert not any(torch.equal(a, b) for a, b in itertools.pairwise(drawn))
        assert len(again) == 3 - keep_graphs
        for one, other in zip(reversed(first[: len(again)]), again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _traffic(stage: int | None) -> tuple[int, list[Counter[str]]]:
    """Return the bytes of the parameters, and of a step's collectives for 1 and for 4 chunks."""
    counts = []
    for num_chunks, kept in ((1, 1), (4, 0), (4, 2), (4, 4)):
        model = tiny_model()
        size = 4 * sum(p.numel() for p in model.parameters())
        engine = _engine(stage, model)
        for step in range(2):  # ZeRO 3 learns the order of its modules in the first
            counted, chunks = Collectives(), _rank_chunks(model, step, num_chunks)
            with counted:
                train_step(engine, GlobalLoss("convse"), chunks, keep_graphs=kept)
        counts.append(counted.num_bytes)
    return size, counts


@pytest.mark.parametrize("stage", [None, *(pytest.param(n, marks=SLOW) for n in range(4))])
def test_gradients_are_reduced_once_a_step_however_many_chunks_there_are(stage: int | None) -> None:
    size, (whole, *cached) = run_distributed(_traffic, 2, stage)[0]
    reductions = ("allreduce", "reduce", "reduce_scatter_base")
    for counted in (whole, *cached):
        reduced = sum(counted[name] for name in reductions)
        assert size <= reduced <= size + 1024  # padding, and the loss's own statistics
    if stage != 3:  # which gathers the parameters for every forward and backward
        assert all(counted == whole for counted in cached)


def _kept_graphs_that_zero_3_gets_wrong() -> None:
    model = tiny_model()
    engine = _engine(3, model, coalesce=False)
    train_step(engine, GlobalLoss("convse"), _rank_chunks(model, 0, 4), keep_graphs=2)


@pytest.mark.slow
def test_kept_graphs_that_zero_3_gets_wrong_are_refused() -> None:
    with pytest.raises(AssertionError, match="keep_graphs"):
        run_distributed(_kept_graphs_that_zero_3_gets_wrong, 2)


def test_the_random_state_moves_on_between_steps() -> None:
    model = tiny_model(dropout=0.3)
    engine = PlainEngine(model, _sgd(model))
    images, tokens = tiny_batch(4, 0)
    chunk = model.prepare(images=images, tokens=tokens)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train_step(engine, GlobalLoss("convse"), [chunk, chunk])
    assert not torch.equal(before, torch.get_rng_state())


def test_a_loss_that_is_not_finite_updates_nothing() -> None:
    model = tiny_model()
    engine = PlainEngine(model, _sgd(model))
    before = _parameters(model)
    chunk = _rank_chunks(model, 0, 1)
    with pytest.raises(UserError, match="the loss is nan: nothing was updated"):
        train_step(engine, Plain(lambda i, *_: i.sum() * float("nan")), chunk)
    assert torch.equal(before, _parameters(model))


@pytest.mark.parametrize("keep_graphs", [0, 1, 3])
def test_batch_norms_statistics_move_once_a_chunk(keep_graphs: int) -> None:
    model = tiny_model()
    norm = torch.nn.BatchNorm1d(16)
    model.image.head.append(norm)
    train_step(
        PlainEngine(model, _sgd(model)),
        GlobalLoss("convse"),
        _rank_chunks(model, 0, 4),
        keep_graphs=keep_graphs,
    )
    assert norm.num_batches_tracked == 4


def test_images_stay_on_the_host_until_their_chunks_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images_at = tiny_model(), list[str]()

    class _Watching(PlainEngine):
        def __call__(self, **inputs: Tensor) -> Any:
            images_at.append(inputs["images"].device.type)
            assert inputs["images"].dtype == torch.uint8
            return super().__call__(
                **{name: torch.ones_like(x, device="cpu") for name, x in inputs.items()}
            )

    chunks = _rank_chunks(model, 0, 4)
    real, elsewhere = grad_cache.prefetch_to_device, torch.device("meta")
    monkeypatch.setattr(grad_cache, "prefetch_to_device", lambda c, here: real(c, elsewhere))
    train_step(_Watching(model, _sgd(model)), GlobalLoss("convse"), chunks, keep_graphs=0)
    assert images_at == ["meta"] * 8
    assert all(chunk["images"].device.type == "cpu" for chunk in chunks)


def test_activation_checkpointing_changes_no_number() -> None:
    trained = []
    for grad_checkpointing in (False, True):
        model = tiny_model(dropout=0.3, grad_checkpointing=grad_checkpointing)
        torch.manual_seed(1)
        chunks = _rank_chunks(model, 0, 4)
        train_step(PlainEngine(model, _sgd(model)), GlobalLoss("convse"), chunks, keep_graphs=2)
        trained.append(_parameters(model))
    assert torch.equal(*trained)


@pytest.mark.parametrize("keep_graphs", [0, 1, 2, 4])
@pytest.mark.parametrize("image", ["test_resnet", "test_efficientnet"])
def test_activation_checkpointing_is_exact_with_batch_norm(image: str, keep_graphs: int) -> None:
    trained = []
    for grad_checkpointing in (False, True):
        model = tiny_model(grad_checkpointing=grad_checkpointing, image=image)
        chunks = _rank_chunks(model, 0, 4)
        engine = PlainEngine(model, _sgd(model))
        train_step(engine, GlobalLoss("convse"), chunks, keep_graphs=keep_graphs)
        trained.append(_parameters(model))
        trained.append(torch.cat([b.detach().flatten().double() for b in model.buffers()]))
    assert torch.equal(trained[0], trained[2]), "the parameters"
    assert torch.equal(trained[1], trained[3]), "the statistics"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("g++") is None, reason="nothing can be compiled without g++")
def test_compiled_trunks_train_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    start, trained = _parameters(tiny_model()), []
    for compiled in (False, True):
        model = tiny_model(compiled=compiled)
        chunks = _rank_chunks(model, 0, 2)
        train_step(PlainEngine(model, _sgd(model)), GlobalLoss("convse"), chunks, keep_graphs=1)
        trained.append(_parameters(model))
    eager, other = trained
    assert (eager - other).norm() < 1e-5 * (eager - start).norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # it did compile


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("g++") is None, reason="nothing can be compiled without g++")
def test_compiled_trunks_draw_the_same_dropout_in_both_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny_model(dropout=0.3, compiled=True)
    seen: list[tuple[Tensor, ...]] = []
    model.register_forward_hook(lambda _, __, out: seen.append(out))
    chunks = _rank_chunks(model, 0, 2)
    train_step(PlainEngine(model, _sgd(model)), GlobalLoss("convse"), chunks, keep_graphs=0)
    first, second = seen[:2], seen[:1:-1]
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x.detach(), y.detach()) for x, y in zip(a, b, strict=True))
