"""Fused kernels that fail or compute something else are found before a run depends on them."""

import logging
from typing import Any

import pytest
import torch

from dist_vse.common.errors import UserError
from dist_vse.config import LossConfig, TrainConfig
from dist_vse.losses import fused
from dist_vse.losses.registry import LOSSES
from dist_vse.training import kernel_check
from dist_vse.training.kernel_check import settle_kernels

pytest.importorskip("triton", reason="Triton is not installed: the fused kernels are NOT tested")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
ROWS = 40


def config(name: str, kernels: str) -> TrainConfig:
    return TrainConfig(loss=LossConfig(name=name, kernels=kernels))


@pytest.mark.parametrize("name", LOSSES)
def test_right_kernels_stay(name: str) -> None:
    given = config(name, "fused")
    assert settle_kernels(given, rows=ROWS) == given


def test_where_tiles_run_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "_find_fault", None)
    for kernels in ("tiled", "auto"):  # auto is tiled on a CPU
        assert settle_kernels(config("convse", kernels)) == config("convse", kernels)


def _wrong(*_: Any) -> None:
    """Lose the maxima."""


def _fails(*_: Any) -> None:
    raise RuntimeError("PassManager::run failed\nat line 7")


@pytest.mark.parametrize(
    ("replacement", "message"),
    [(_wrong, "of convse are wrong here"), (_fails, r"fail here \(RuntimeError: PassManager")],
)
def test_wrong_kernels_give_way_to_tiles(
    replacement: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fused, "_join_powers", replacement)
    with pytest.raises(UserError, match=message):
        settle_kernels(config("convse", "fused"), rows=ROWS)
    # As on a GPU, where auto is fused.
    monkeypatch.setattr(kernel_check, "choose_kernels", lambda *_: ("fused", "loss.kernels=auto"))
    with caplog.at_level(logging.WARNING, "dist_vse"):
        settled = settle_kernels(config("convse", "auto"), rows=ROWS)
    assert settled == config("convse", "tiled")
    assert "the loss runs in tiles" in caplog.text and "\n" not in caplog.messages[-1]


def test_nan_counts_as_wrong() -> None:
    one = torch.ones(2)
    assert kernel_check._error(one * torch.nan, one) == float("inf")
