"""What else we assume about DeepSpeed holds, and an assumption that fails is answered."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from dist_vse.common import step_timer
from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from dist_vse.engine import deepspeed_internals as internals
from dist_vse.engine.plain import PlainEngine
from tests.support.distributed import run_distributed
from tests.support.paths import ROOT
from tests.support.tiny import tiny_model
from tests.support.zero_engines import build_engine, rank_batch, sgd, train


class _Parts:
    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, part: str) -> None:
        self.told.append(part)


def _parts_of_a_weights_gather() -> list[str]:
    engine, parts = build_engine(1), _Parts()
    with engine.accumulation():
        outputs = engine(**rank_batch(engine.module, 0))
        engine.backward(sum(output.sum() for output in outputs), last=True)
    step_timer.begin("step")
    with step_timer.listening(parts):
        engine.step()  # gathers the new weights
    return parts.told


@pytest.mark.slow
def test_time_collectives() -> None:
    for told in run_distributed(_parts_of_a_weights_gather, 2):
        assert "reduce" in told, "DeepSpeed calls no function of `deepspeed.comm` any more"


def _built_operators() -> list[str]:
    """Return what DeepSpeed builds where it could, before and after we say no."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    class Builder:
        NAME = "deepspeed_shm_comm"

        def load(self) -> str:
            return "built"

        def absolute_name(self) -> str:
            return self.NAME

    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.create_op_builder = lambda name: (
        Builder() if name == "ShareMemCommBuilder" else None
    )
    __compatible_ops__[Builder.NAME] = True
    backend = sys.modules["deepspeed.comm.torch"]
    before = backend.build_shm_op()
    internals.skip_shared_memory_operator()
    return [before, backend.build_shm_op()]


def test_skip_shared_memory_operator() -> None:
    assert run_distributed(_built_operators, 1) == [["built", None]]


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _messages_of_deepspeed(quiet: bool) -> list[str]:
    if not quiet:
        internals.quiet_log = lambda: None
    messages = _Messages()
    logging.getLogger("DeepSpeed").addHandler(messages)
    build_engine(1)
    return messages.texts


def test_quiet_warnings() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        internals.quiet_warnings()
        warnings.warn(
            "RNN module weights are not part of single contiguous chunk of memory. This means they "
            "need to be compacted at every call",
            stacklevel=1,
        )
        warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in seen] == ["another"]


@pytest.mark.slow
def test_quiet_log() -> None:
    (loud,), (quiet,) = (run_distributed(_messages_of_deepspeed, 1, q) for q in (False, True))
    assert any("untested optimizer" in text for text in loud)
    assert quiet == []


def test_the_supported_versions_are_those_of_the_package() -> None:
    assert f'"deepspeed{internals.SUPPORTED}"' in Path(ROOT / "pyproject.toml").read_text()


def _hide(name: str) -> None:
    """Have the internals find no attribute of this name."""
    private = internals._private

    def hiding(owner: Any, asked: str) -> Any:
        return private(object() if asked == name else owner, asked)

    internals._private = hiding


def _fall_back(stage: int, name: str) -> tuple[Tensor, bool, list[str]]:
    _hide(name)
    messages = _Messages()
    logger.addHandler(messages)
    engine = build_engine(stage)
    return train(engine, 2), engine.reduction is None, messages.texts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (0, "enable_backward_allreduce"),
        (1, "average_tensor"),
        (2, "average_tensor"),
        (2, "param_to_partition_ids"),
    ],
)
def test_without_an_internal_deepspeed_reduces_by_itself(stage: int, name: str) -> None:
    model = tiny_model()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    expected = train(PlainEngine(model, sgd(model)), 2)  # one process, the whole batch
    for rank, (found, fell_back, told) in enumerate(run_distributed(_fall_back, 2, stage, name)):
        assert fell_back
        assert (found - expected).norm() < 1e-5 * (expected - start).norm()
        assert len(told) == (1 if rank == 0 else 0)
        assert all(f".{name}: it reduces gradients by itself" in line for line in told)


def _refused(stage: int, name: str) -> str:
    _hide(name)
    with pytest.raises(UserError) as error:
        build_engine(stage)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (1, "_hp_mapping"),
        (2, "single_partition_of_fp32_groups"),
        (3, "grad_position"),
        (3, "ds_shape"),
        (3, "ds_active_sub_modules"),
        (2, "averaged_gradients"),
    ],
)
def test_without_the_optimizers_state_the_engine_is_refused(stage: int, name: str) -> None:
    (message,) = run_distributed(_refused, 1, stage, name)
    assert "\n" not in message and f".{name}: checkpoints can't be written" in message
    assert message.endswith(f"install deepspeed{internals.SUPPORTED}")
