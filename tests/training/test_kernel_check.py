"""Fused kernels that fail or compute something else are found before a run depends on them."""

import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dist_vse.common.errors import UserError
from dist_vse.config import LossConfig, ModelConfig, TrainConfig
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
    assert settle_kernels(given, rows=ROWS) == (given, "fused", "loss.kernels=fused")


def test_where_tiles_run_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "_find_fault", None)
    for kernels in ("tiled", "auto"):  # auto is tiled on a CPU
        settled = settle_kernels(config("convse", kernels))
        assert settled[:2] == (config("convse", kernels), "tiled")


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
    monkeypatch.setattr(
        kernel_check, "choose_kernels", lambda *_, **__: ("fused", "loss.kernels=auto")
    )
    with caplog.at_level(logging.WARNING, "dist_vse"):
        settled = settle_kernels(config("convse", "auto"), rows=ROWS)
    assert settled[:2] == (config("convse", "tiled"), "tiled")
    assert re.search(message, settled.reason)
    assert "the loss runs in tiles" in caplog.text and "\n" not in caplog.messages[-1]


def test_kernels_are_compiled_while_the_first_batch_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked, compiled = threading.Event(), threading.Event()

    def batches() -> Iterator[int]:
        asked.set()
        assert compiled.wait(20), "the batch is waited for before the kernels are compiled"
        yield from (1, 2, 3)

    def compile_kernels(config: TrainConfig) -> float:
        assert asked.wait(20), "nobody loads the batch meanwhile"
        compiled.set()
        return 7.0

    monkeypatch.setattr(kernel_check, "compile_kernels", compile_kernels)
    with caplog.at_level(logging.INFO, "dist_vse"):
        found = kernel_check.compile_meanwhile(batches(), config("convse", "fused"))
    assert [*found] == [1, 2, 3]
    assert "compiled or found in Triton's cache in 7.0 s, while the first batch" in caplog.text


def test_a_batch_that_fails_is_raised_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def batches() -> Iterator[int]:
        raise UserError("no shard")
        yield 1

    monkeypatch.setattr(kernel_check, "compile_kernels", lambda config: 0.0)
    found = kernel_check.compile_meanwhile(batches(), config("convse", "fused"))
    with pytest.raises(UserError, match="no shard"):
        next(found)


def test_every_kernel_of_the_run_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: set[tuple[str, int, int]] = set()
    real = fused.Tiles.run

    def run(tiles: fused.Tiles, kernel: str, *args: Any, **constants: Any) -> None:
        ran.add((kernel, tiles.rows.shape[1], tiles.duplicates))
        real(tiles, kernel, *args, **constants)

    monkeypatch.setattr(fused.Tiles, "run", run)
    loss = LossConfig(name="convse++", kernels="fused", warmup_samples=100)
    model = ModelConfig(embed_dim=16)
    assert kernel_check.compile_kernels(TrainConfig(loss=loss, model=model)) > 0
    kernels = ("hardest", "pair_sums", "weights")
    assert ran == {(kernel, 16, duplicates) for kernel in kernels for duplicates in (0, 1)}


def test_nan_counts_as_wrong() -> None:
    one = torch.ones(2)
    assert kernel_check._error(one * torch.nan, one) == float("inf")
