"""The loss that a config describes."""

import pytest

from dist_vse.common.errors import UserError
from dist_vse.config import EngineConfig, LossConfig, TrainConfig
from dist_vse.training.step_loss import loss_options
from tests.support.pretend_gpu import pretend_gpu


@pytest.mark.parametrize(
    ("asked", "precision", "on_cpu", "on_gpu"),
    [
        ("auto", "bf16", False, True),
        ("auto", "fp16", False, False),
        ("auto", "fp32", False, False),
        (True, "fp32", True, True),
        (False, "bf16", False, False),
    ],
)
def test_a_bf16_run_on_a_gpu_has_bf16_products(
    asked: bool | str, precision: str, on_cpu: bool, on_gpu: bool
) -> None:
    engine = EngineConfig(precision=precision)
    config = TrainConfig(loss=LossConfig(bf16_products=asked), engine=engine)
    assert loss_options(config, 0).bf16_products is on_cpu
    with pretend_gpu():
        assert loss_options(config, 0).bf16_products is on_gpu


def test_another_word_is_refused() -> None:
    with pytest.raises(UserError, match=r"loss.bf16_products='yes' must be true, false or auto"):
        LossConfig(bf16_products="yes")
