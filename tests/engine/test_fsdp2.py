"""FSDP2: as the plain engine in every precision, sharded, and reduced once a step."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig, LossConfig, ModelConfig, OptimConfig, TextConfig
from dist_vse.config.load import load_config
from dist_vse.engine import Engine, RunEngine
from dist_vse.engine.float32_layers import float32_layers
from dist_vse.engine.fsdp2 import Fsdp2Engine
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder, average_statistics
from dist_vse.models.layers import blocks
from dist_vse.models.precision import autocast
from dist_vse.models.tokenizer import AnyWords
from dist_vse.training.grad_cache import train_step
from tests.support.distributed import run_distributed
from tests.support.engines import FSDP2, build
from tests.support.tiny import VOCABULARY, tiny_batch, tiny_model

B, CHUNKS = 16, 2
IMAGE, TEXT = ImageConfig(name="test_vit", size=32), TextConfig(kind="gru", width=16, max_tokens=8)


def _model(kind: str) -> DualEncoder:
    if kind == "gru":
        config = ModelConfig(image=ImageConfig(name="test_resnet", size=32), text=TEXT)
        return build_model(config, LossConfig(learn_temperature=True), AnyWords(VOCABULARY))
    model = tiny_model(grad_checkpointing=kind == "checkpointing", dropout=0.1)
    if kind == "frozen":
        model.image.trunk.requires_grad_(False)
        model.image.frozen = True
        model.train()
    return model


def _engine(kind: str, precision: str, stage: int | None) -> Engine:
    model = _model(kind)
    sgd = build_optimizer(model, OptimConfig(name="sgd", lr=0.05, weight_decay=0.1, momentum=0.9))
    engine: Engine
    if stage is None:
        engine = PlainEngine(model, sgd, 0.1, precision)
    else:
        layers = set[nn.Module]()
        if precision != "fp32":
            layers = float32_layers(model, precision, image_size=32, num_tokens=8)
            assert not any(isinstance(layer, nn.Linear) for layer in layers)
            assert any(isinstance(layer, nn.LayerNorm | nn.BatchNorm2d) for layer in layers)
        engine = build(
            *(model, sgd, stage),
            batch_size=B,
            clip_norm=0.1,
            float32_layers=layers,
            precision=precision,
        )
    if engine.loss_scale is not None:
        engine.loss_scale.value = 2.0**6
    return engine


def _train(engine: Engine, precision: str = "fp32") -> None:
    rank, rows = distributed.rank(), B // distributed.world_size()
    torch.manual_seed(rank)  # of dropout
    for number in range(2):
        images, tokens = (x[rank * rows : (rank + 1) * rows] for x in tiny_batch(B, number))
        pieces = zip(images.chunk(CHUNKS), tokens.chunk(CHUNKS), strict=True)
        with autocast(distributed.device(), precision):
            chunks = [engine.module.prepare(images=i, tokens=t) for i, t in pieces]
        train_step(engine, GlobalLoss("info_nce"), chunks)
    average_statistics(engine.module)


def _state(model: nn.Module) -> Tensor:
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    return torch.cat([value.detach().flatten() for value in state.values()])


def _errors(cases: list[tuple[str, str, int]]) -> dict[tuple[str, str, int], float]:
    """Return how far FSDP2's weights and statistics are from the plain engine's, a case each."""
    found = {}
    for kind, precision, stage in cases:
        start = _state(_model(kind))
        plain, sharded = _engine(kind, precision, None), _engine(kind, precision, stage)
        _train(plain, precision)
        _train(sharded, precision)
        expected = _state(plain.module)
        with sharded.gathered_parameters() as model:  # type: ignore[attr-defined]
            error = (_state(model) - expected).norm() / (expected - start).norm()
        found[kind, precision, stage] = float(error)
    return found


CASES = [
    ("plain", "bf16", FSDP2 + 3),
    ("plain", "fp16", FSDP2 + 2),
    ("checkpointing", "bf16", FSDP2 + 3),
    ("checkpointing", "fp32", FSDP2 + 2),
    ("frozen", "bf16", FSDP2 + 3),
    ("frozen", "fp32", FSDP2 + 2),
    ("gru", "bf16", FSDP2 + 3),
    ("gru", "fp32", FSDP2 + 3),
]


def _everything() -> dict[str, Any]:
    return {"errors": _errors(CASES), **_sharded(), **_reductions()}


def _sharded() -> dict[str, Any]:
    """Return what a rank holds, and what a model gives that it gathers for a while."""
    engine = _engine("plain", "fp32", FSDP2 + 3)
    assert isinstance(engine, Fsdp2Engine)
    whole = sum(p.numel() for p in tiny_model().parameters())
    own = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    start = _state(tiny_model(dropout=0.1))
    images, _ = tiny_batch(4, 0)
    with engine.gathered_parameters() as model:
        same = torch.equal(_state(model), start)
        plain = not any(isinstance(m, FSDPModule) for m in model.modules())
        for _ in range(distributed.rank()):  # rank 0 runs none, and nobody waits for it
            model.eval().encode_images(images)
    blocks_left = [p.device.type for p in engine._whole.parameters()]
    return {"share": own / whole, "same": same, "plain": plain, "left": {*blocks_left}}


def _reductions() -> dict[str, int]:
    """Count reduce-scatters of a step with two chunks."""
    counts = {}
    for coalesce in (True, False):
        model = tiny_model()
        sgd = build_optimizer(model, OptimConfig(name="sgd", lr=0.05))
        engine: RunEngine = build(model, sgd, FSDP2 + 3, batch_size=B, coalesce=coalesce)
        assert isinstance(engine, Fsdp2Engine)
        # Newer versions of PyTorch have the first name.
        names = [n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, n)]
        with mock.patch.object(dist, names[0], wraps=getattr(dist, names[0])) as watched:
            _train(engine)
        counts["once" if coalesce else "each"] = watched.call_count / len(engine._units) / 2
    return counts


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_fsdp2_trains_as_the_plain_engine_and_holds_a_share() -> None:
    for found in run_distributed(_everything, 2, timeout=200):
        off = {case: error for case, error in found["errors"].items() if not error < 1e-4}
        assert not off
        assert 0.45 < found["share"] < 0.55
        assert found["same"] and found["plain"] and found["left"] == {"meta"}
        assert found["once"] == 1 and found["each"] == CHUNKS


def test_blocks_come_before_what_holds_them() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    outer = nn.ModuleList([nn.Sequential(inner, nn.ReLU()), nn.Sequential(nn.Linear(2, 2))])
    found = blocks(nn.Sequential(outer, nn.GELU()))
    assert found == [outer[1][0], *inner, *outer]  # type: ignore[index]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["engine.name=fsdp"], r"engine.name='fsdp' is unknown"),
        (["engine.name=fsdp2"], "engine.zero_stage=1 does not: set engine.zero_stage to 2"),
        (["engine.zero_stage=3", "optim.name=lamb"], "hands it pieces of them"),
        (["engine.zero_stage=2", "batch_report=true"], "is for engine.name=deepspeed"),
        (["engine.zero_stage=2", "model.compile=true"], "is for engine.name=deepspeed"),
    ],
)
def test_what_fsdp2_cannot_do_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(None, ["engine.name=fsdp2", *overrides])
