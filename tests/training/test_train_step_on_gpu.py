"""A train step on a pretend GPU: the CPU's numbers, and at most two waits of the host."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.config import EngineConfig, OptimConfig
from dist_vse.engine import Engine
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.engine.zero import ZeroEngine
from dist_vse.losses import layout
from dist_vse.models import text
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.training import grad_cache
from dist_vse.training.grad_cache import train_step
from dist_vse.training.replay_check import compare_passes
from tests.support.distributed import run_distributed
from tests.support.loss_cases import NAMES, step_loss
from tests.support.pretend_gpu import GpuTensor, move, pretend_gpu
from tests.support.tiny import tiny_batch, tiny_model

ROWS, CHUNK = 12, 5  # a rank's: chunks of 5, 5 and 2
STEP_WAITS = 2  # what the ranks must know of each other's features; whether the loss is finite


def _engine(model: DualEncoder, stage: int | None, clip_norm: float) -> Engine:
    config = OptimConfig(name="sgd", lr=0.05, weight_decay=0.0)
    sgd = build_optimizer(model, config)
    if stage is None:
        return PlainEngine(model, sgd, clip_norm)
    return ZeroEngine(model, sgd, EngineConfig(stage), rank_batch_size=ROWS, clip_norm=clip_norm)


def _step(
    model: DualEncoder,
    name: str,
    options: dict[str, Any],
    stage: int | None = None,
    clip_norm: float = 0.0,
) -> list[Tensor]:
    """Take a step with this rank's rows; return the loss and the parameters."""
    rank = distributed.rank()
    images, tokens = tiny_batch(ROWS * distributed.world_size(), 0)
    mine = slice(ROWS * rank, ROWS * (rank + 1))
    images, tokens = images[mine], tokens[mine]
    if model.log_scale.is_cuda:
        images, tokens = images.pin_memory(), tokens.pin_memory()
    pieces = zip(images.split(CHUNK), tokens.split(CHUNK), strict=True)
    chunks = [model.prepare(images=i, tokens=t) for i, t in pieces]
    ids = torch.arange(ROWS * rank, ROWS * (rank + 1)) // 2  # with duplicates
    engine = _engine(model, stage, clip_norm)
    loss = step_loss(name, image_ids=ids, text_ids=ids, **options)
    torch.manual_seed(1 + rank)
    output = train_step(engine, loss, chunks)
    return [output.loss, *(p.detach() for p in model.parameters())]


def _compare(
    name: str, options: dict[str, Any], stage: int | None = None, clip_norm: float = 0.0
) -> dict[str, int]:
    """Compare with the CPU; return the waits, but for those of DeepSpeed's own code."""
    right = _step(tiny_model(dropout=0.3), name, options, stage, clip_norm)
    model = tiny_model(dropout=0.3)
    with pretend_gpu() as gpu:
        move(model)
        found = _step(model, name, options, stage, clip_norm)
    # ZeRO 0 clips as PyTorch does; ZeRO 3 always takes a norm, and splits parameters by the host.
    takes_norm = stage == 3 or (stage in (1, 2) and clip_norm > 0)
    read = [place for place in gpu.deepspeeds if not place.startswith("tensor ")]  # sent there
    assert bool(read) == takes_norm, gpu.deepspeeds
    for ours, theirs in zip(found, right, strict=True):
        assert isinstance(ours, GpuTensor)
        torch.testing.assert_close(ours.inner, theirs, rtol=1e-5, atol=1e-6)
    return dict(gpu.waits)


def test_one_process_has_the_numbers_of_the_cpu() -> None:
    waits = _compare("convse", {})
    assert sum(waits.values()) <= STEP_WAITS, waits


def _compare_all(transport: str) -> list[tuple[str, dict[str, int]]]:
    return [(name, _compare(name, {"transport": transport, "tile": 8})) for name in NAMES]


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["gather", pytest.param("ring", marks=pytest.mark.slow)])
def test_two_ranks_have_the_numbers_of_the_cpu(transport: str) -> None:
    for of_rank in run_distributed(_compare_all, 2, transport, timeout=110):
        for name, waits in of_rank:
            assert sum(waits.values()) <= STEP_WAITS, (name, waits)


ZERO = [(stage, clip_norm) for stage in (0, 1, 2, 3) for clip_norm in (0.0, 0.1)]


def _compare_zero(cases: list[tuple[int, float]], spoilt: bool) -> list[dict[str, int]]:
    """Compare under ZeRO; `spoilt` leaves the ids of the pairs on the host."""
    if spoilt:
        layout.sent = lambda x, device: x
    return [_compare("convse", {"tile": 8}, *case) for case in cases]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (2, ZERO[2:3]),
        pytest.param(1, ZERO, marks=pytest.mark.slow),
        pytest.param(2, ZERO, marks=pytest.mark.slow),
    ],
    ids=["ZeRO 1", "one process", "two processes"],
)
def test_zero_has_the_numbers_of_the_cpu(world_size: int, cases: list[tuple[int, float]]) -> None:
    for of_rank in run_distributed(_compare_zero, world_size, cases, False, timeout=280):
        for case, waits in zip(cases, of_rank, strict=True):
            assert sum(waits.values()) <= STEP_WAITS, (case, waits)


@pytest.mark.slow
def test_a_tensor_of_the_host_is_seen_under_zero() -> None:
    with pytest.raises(AssertionError, match="HostMeetsDeviceError: tensors of host and device"):
        run_distributed(_compare_zero, 1, ZERO[2:3], True)


@pytest.mark.parametrize(
    ("leaves_autocast", "culprit"), [(True, None), (False, "model.text.trunk.gru")]
)
def test_no_float16_in_a_bf16_run(
    leaves_autocast: bool, culprit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = nn.GRU.forward

    def cudnns(self: nn.GRU, x: Tensor) -> tuple[Tensor, Tensor]:
        """Under autocast to bfloat16 it takes float16."""
        states, last = real(self, x)
        return (states.half(), last) if torch.is_autocast_enabled("cpu") else (states, last)

    monkeypatch.setattr(nn.GRU, "forward", cudnns)
    if not leaves_autocast:
        monkeypatch.setattr(text, "float32_rnn", lambda x: contextlib.nullcontext())
    model = tiny_model()
    model.text.trunk = text.GruTrunk(
        vocab_size=50, pad_id=0, word_dim=8, width=64, depth=2, dropout=0, grad_checkpointing=False
    )
    with pretend_gpu():
        move(model)
        found = compare_passes(model, image_size=32, num_tokens=8, precision="bf16")
    assert found.error == 0.0
    assert found.in_float16 == (culprit and f"{culprit} (GRU)")


def test_a_wait_in_every_chunk_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = grad_cache._outputs

    def outputs(*args: Any) -> Any:
        found = real(*args)
        assert found[0].sum().item() != 0
        return found

    monkeypatch.setattr(grad_cache, "_outputs", outputs)
    assert sum(_compare("convse", {}).values()) == STEP_WAITS + 3
