"""Retrieval metrics in VSE++'s way, compared with chance, and of features that do not fit."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.evaluation.retrieval import (
    RECALLS,
    chance,
    check_features,
    own_pairs,
    retrieval_metrics,
)
from tests.support.vectors import unit


def vsepp_ranks(images: Tensor, texts: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks from 0 with five captions an image in a row, by sorting the whole matrix."""
    scores = (images.double() @ texts.double().T).numpy()
    i2t = [
        min(int(np.where(np.argsort(-row) == 5 * i + c)[0][0]) for c in range(5))
        for i, row in enumerate(scores)
    ]
    t2i = [int(np.where(np.argsort(-column) == j // 5)[0][0]) for j, column in enumerate(scores.T)]
    return np.array(i2t), np.array(t2i)


def test_equals_sorting_the_matrix_with_five_captions_an_image() -> None:
    images = unit(120, 16, 0)
    texts = torch.nn.functional.normalize(images.repeat_interleave(5, 0) + 1.5 * unit(600, 16, 1))
    metrics = retrieval_metrics(images, texts, torch.arange(600) // 5)
    for name, ranks in zip(("i2t", "t2i"), vsepp_ranks(images, texts), strict=True):
        for k in RECALLS:
            assert metrics[f"{name}_r{k}"] == pytest.approx(100 * np.mean(ranks < k), abs=1e-12)
        assert metrics[f"{name}_medr"] == math.floor(np.median(ranks)) + 1
        assert metrics[f"{name}_meanr"] == pytest.approx(ranks.mean() + 1, abs=1e-12)
    assert 50 < metrics["i2t_r1"] < 100  # neither trivial nor noise
    assert metrics["tied"] == 0
    assert metrics["rsum_min"] == metrics["rsum_max"] == pytest.approx(metrics["rsum"])


@pytest.mark.parametrize("rows", [list(range(12)), [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 6, 6, 6], [0, 0]])
def test_collapsed_features_score_exactly_chance(rows: list[int]) -> None:
    image_of_text = torch.tensor(rows)
    same = unit(1, 64, 0)
    metrics = retrieval_metrics(
        same.repeat(max(rows) + 1, 1), same.repeat(len(rows), 1), image_of_text
    )
    for name, value in chance(own_pairs(image_of_text), max(rows) + 1, len(rows)).items():
        assert metrics[name] == pytest.approx(value, abs=1e-12), name


def test_chance_in_closed_form() -> None:
    expected = chance(own_pairs(torch.arange(5000) // 5), 1000, 5000)
    assert expected["t2i_r1"] == pytest.approx(100 / 1000)
    assert expected["t2i_r10"] == pytest.approx(1000 / 1000)
    assert expected["i2t_r1"] == pytest.approx(100 * 5 / 5000)
    none_of_ten = math.comb(4995, 10) / math.comb(5000, 10)
    assert expected["i2t_r10"] == pytest.approx(100 * (1 - none_of_ten), rel=1e-10)
    assert expected["t2i_meanr"] == pytest.approx(500.5)
    assert expected["i2t_meanr"] == pytest.approx(5001 / 6)
    assert expected["t2i_medr"] == 500
    median = next(r for r in range(5001) if 1 - math.comb(5000 - r, 5) / math.comb(5000, 5) >= 0.5)
    assert expected["i2t_medr"] == median


def test_chance_is_what_random_features_reach() -> None:
    image_of_text = torch.arange(2000) // 2
    metrics = retrieval_metrics(unit(1000, 32, 0), unit(2000, 32, 1), image_of_text)
    expected = chance(own_pairs(image_of_text), 1000, 2000)
    assert metrics["t2i_meanr"] == pytest.approx(expected["t2i_meanr"], rel=0.05)
    assert metrics["i2t_meanr"] == pytest.approx(expected["i2t_meanr"], rel=0.05)


def test_half_precision_features() -> None:
    images = unit(40, 8, 0)
    metrics = retrieval_metrics(images.bfloat16(), images.bfloat16(), torch.arange(40))
    assert metrics["t2i_r1"] > 90


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite(value: float) -> None:
    images, texts = unit(6, 4, 0), unit(6, 4, 1)
    texts[4, 1] = value
    with pytest.raises(UserError, match=r"text features are not finite: 1 of 6 rows.* row 4"):
        retrieval_metrics(images, texts, torch.arange(6))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 1, 2], "3 rows for 4 texts"),
        ([0, 1, 2, 3], "hold image row 3, but there are 3 images"),
        ([0, 1, 1, 0], "1 of 3 images have no text, the first is row 2"),
        ([0, 1, 2, -1], "hold image row -1; rows start at 0"),
    ],
)
def test_rows_that_do_not_fit(rows: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        retrieval_metrics(unit(3, 4, 0), unit(4, 4, 1), torch.tensor(rows, dtype=torch.int64))


def test_widths_that_differ() -> None:
    with pytest.raises(UserError, match=r"\(3, 4\) and \(3, 5\); give \(n, d\) and \(m, d\)"):
        retrieval_metrics(unit(3, 4, 0), unit(3, 5, 0), torch.arange(3))


def test_warns_of_collapse_on_the_side_that_collapsed() -> None:
    spread, point = unit(20, 8, 0), unit(1, 8, 1).repeat(20, 1)
    assert check_features(spread, spread) == []
    (warning,) = check_features(spread, point)
    assert warning.startswith("the text features are all alike")
    assert check_features(point[:1], spread) == []  # one image says nothing
