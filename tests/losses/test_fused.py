"""The fused kernels in Triton's interpreter: against the dense losses, and at the edges.

The interpreter's blocks are small (16 rows, 32 columns), so that 70 pairs make many tiles.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_vse.losses import fused, kernel_choice
from dist_vse.losses.kernel_choice import choose_kernels
from dist_vse.losses.registry import find_loss
from tests.losses.test_global_loss_distributed import _take_part, _whole
from tests.support.distributed import run_distributed
from tests.support.loss_cases import NAMES, Case, dense_loss, error, global_loss, gradients

pytest.importorskip("triton", reason="Triton is not installed: the fused kernels are NOT tested")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
torch.set_num_threads(1)
CPU = torch.device("cpu")


def fused_gradients(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    """Return the loss and its gradients from the fused kernels, and only from them."""
    has_kernels = find_loss(case.name).fused is not None
    assert choose_kernels("fused", has_kernels, torch.float32, CPU)[0] == "fused"
    return gradients(global_loss, case, dtype=dtype, kernels="fused", **options)


@pytest.mark.parametrize("duplicates", ["mask", pytest.param("positive", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_dense_loss(name: str, duplicates: str) -> None:
    for temperature, weight in ((0.1, 1.0), (0.005, 0.3)):
        case = Case(
            name, 70, temperature=temperature, duplicates=duplicates, groups=60, width=24,
            weight=weight,
        )  # fmt: skip
        assert error(fused_gradients(case), gradients(dense_loss, case)) < 5e-6, temperature


@pytest.mark.parametrize("count", [1, 2, 16, 33])
@pytest.mark.parametrize("name", ["convse", "convse++", "siglip", "vse0"])
def test_ragged_edges(name: str, count: int) -> None:
    case = Case(name, count, width=5)
    assert error(fused_gradients(case), gradients(dense_loss, case)) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_the_tiles(name: str) -> None:
    case = Case(name, 40, groups=30, duplicates="positive")
    images, texts, *scalars = case.leaves(torch.float32)
    options: dict[str, Any] = {"image_ids": case.ids, "duplicates": "positive"}
    ours, tiles = (
        global_loss(name, images, texts, *scalars, kernels=kernels, **options).stats
        for kernels in ("fused", "tiled")
    )
    for key in tiles:
        assert float(ours[key]) == pytest.approx(float(tiles[key]), abs=1e-6), key


@pytest.mark.parametrize("opposite_texts", [slice(7, 12), slice(0)])
@pytest.mark.parametrize("name", ["convse", "dcl"])
def test_a_softmax_without_overflow_or_underflow(name: str, opposite_texts: slice) -> None:
    # Opposite features: whole rows and columns of a tile are 2^-500 of its maximum.
    case = Case(name, 48, width=8, temperature=0.005)
    case.images[:] = case.images[0]
    case.texts[:] = case.images[0] + 0.1 * case.texts
    case.images[5:9] *= -1
    case.texts[opposite_texts] *= -1
    case.texts /= case.texts.norm(dim=1, keepdim=True)
    exact = gradients(dense_loss, case)
    tiles = gradients(global_loss, case, dtype=torch.float32)
    assert error(fused_gradients(case), exact) < 2 * error(tiles, exact) < 1e-4


def test_duplicates_of_either_kind_mark_their_tiles() -> None:
    case = Case("convse", 70, width=24)
    case.ids[3], case.text_ids[68] = case.ids[40], case.text_ids[10]
    assert error(fused_gradients(case), gradients(dense_loss, case)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_features_of_16_bits_are_taken_as_they_are(name: str, dtype: torch.dtype) -> None:
    case = Case(name, 40, width=16)
    case.images, case.texts = (x.to(torch.float64) for x in case.to(dtype))
    near = 2e-2 if dtype == torch.bfloat16 else 2e-3  # to which gradients are rounded
    loss, *grads = fused_gradients(case, dtype)
    exact = gradients(dense_loss, case)
    assert error([loss], exact[:1]) < 1e-6
    assert error(grads, exact[1:]) < near


@pytest.mark.parametrize("name", NAMES)
def test_bf16_products_stay_near(name: str) -> None:
    case = Case(name, 40, width=16, weight=0.0)  # no choice of the hardest that rounding moves
    ours = fused_gradients(case, bf16_products=True)
    assert error(ours, gradients(dense_loss, case)) < 3e-2


@pytest.mark.parametrize("name", ["convse++", "vse++"])
def test_the_hardest_among_copies_is_the_first(name: str) -> None:
    case = Case(name, 70, width=24)
    # Copies in one tile, across tiles, and before and behind the rows that choose them.
    for first, *copies in ((9, 12, 45), (3, 69), (20, 21)):
        case.texts[copies] = case.texts[first].clone()
        case.images[copies] = case.images[first].clone()
    ours, tiles = fused_gradients(case), gradients(global_loss, case, dtype=torch.float32)
    assert error(ours, tiles) < 1e-6


def test_the_same_bits_at_every_run() -> None:
    for name in ("convse", "convse++", "siglip"):
        case = Case(name, 40, groups=30, width=24, weight=0.5)
        first, second = fused_gradients(case), fused_gradients(case)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name


@pytest.mark.parametrize("name", NAMES)
def test_strips_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(name, 70, groups=60, width=24, duplicates="positive", weight=0.5)
    exact = gradients(dense_loss, case)
    for constant, size in (
        ("FORWARD_COLUMNS", 32),
        ("GRADIENT_ROWS", 48),
        ("GRADIENT_COLUMNS", 40),
    ):
        monkeypatch.setattr(fused, constant, size)
    assert error(fused_gradients(case), exact) < 2e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_not_finite_make_a_loss_that_is_not(name: str, bad: float) -> None:
    case = Case(name, 20)
    case.texts[5, 0] = bad
    images, texts, *scalars = case.leaves(torch.float32)
    assert not torch.isfinite(global_loss(name, images, texts, *scalars, kernels="fused").loss)


def _compare(counts: tuple[int, ...], duplicates: str) -> dict[str, float]:
    errors = {}
    for name, transport in itertools.product(NAMES, ("gather", "ring")):
        case = Case(name, sum(counts), groups=16, duplicates=duplicates, weight=0.4)
        exact = gradients(dense_loss, case)
        _take_part(case, counts)
        ours = _whole(fused_gradients(case, transport=transport))
        errors[f"{name} {transport}"] = error(ours, exact)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "duplicates"), [((18, 6), "mask"), ((5, 18), "positive"), ((0, 6), "mask")]
)
def test_two_ranks_equal_one_process(counts: tuple[int, ...], duplicates: str) -> None:
    for errors in run_distributed(_compare, 2, counts, duplicates):
        assert max(errors.values()) < 3e-6, errors


def test_what_can_not_be_fused_runs_in_tiles_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_kernels("auto", True, torch.float32, CPU) == ("tiled", "the device is cpu")
    assert choose_kernels("tiled", True, torch.float32, CPU)[0] == "tiled"
    assert "no fused" in choose_kernels("fused", False, torch.float32, CPU)[1]
    assert "float64" in choose_kernels("fused", True, torch.float64, CPU)[1]

    said: list[str] = []
    monkeypatch.setattr(kernel_choice.logger, "warning", said.append)
    kernel_choice.log_choice.cache_clear()
    case = Case("convse", 12)
    for _ in range(2):
        tiles = gradients(global_loss, case, kernels="fused")  # float64
    assert all(torch.equal(a, b) for a, b in zip(tiles, gradients(global_loss, case), strict=True))
    assert said == ["the loss runs in tiled kernels (features are torch.float64)"]
