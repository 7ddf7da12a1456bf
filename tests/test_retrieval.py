"""Retrieval metrics against brute force, against VSE++'s way, and under ties."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dist_vse.errors import UserError
from dist_vse.retrieval import (
    RECALLS,
    chance,
    check_features,
    rank_all,
    retrieval_metrics,
    top_k,
)


def unit(rows: int, width: int, seed: int) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1)


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


def mean_over_tie_orders(
    scores: NDArray[np.float64], right: NDArray[np.bool_]
) -> tuple[dict[int, float], float]:
    """Recalls and rank of one query, as the mean over every order of the items."""
    ranks = []
    for order in itertools.permutations(range(len(scores))):
        listed = sorted(order, key=lambda item: -scores[item])  # stable: `order` breaks ties
        ranks.append(1 + next(place for place, item in enumerate(listed) if right[item]))
    return {k: float(np.mean([r <= k for r in ranks])) for k in RECALLS}, float(np.mean(ranks))


@st.composite
def tied_problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Few small whole numbers as features, so that many scores are equal."""
    n = draw(st.integers(1, 4))
    extra = draw(st.lists(st.integers(0, n - 1), max_size=6 - n))
    rows = draw(st.permutations([*range(n), *extra]))
    values = st.lists(st.integers(-1, 1), min_size=2, max_size=2)
    images = draw(st.lists(values, min_size=n, max_size=n))
    texts = draw(st.lists(values, min_size=len(rows), max_size=len(rows)))
    return torch.tensor(images).float(), torch.tensor(texts).float(), torch.tensor(rows)


@settings(deadline=None, max_examples=60)
@given(tied_problems(), st.integers(1, 4))
def test_ties_count_as_the_mean_over_their_orders(
    problem: tuple[Tensor, Tensor, Tensor], tile: int
) -> None:
    images, texts, image_of_text = problem
    scores = (images @ texts.T).double().numpy()
    own = (torch.arange(len(images))[:, None] == image_of_text).numpy()
    for ranks, matrix, right in zip(
        rank_all(images, texts, image_of_text, tile=tile),
        (scores, scores.T),
        (own, own.T),
        strict=True,
    ):
        truth = [mean_over_tie_orders(*query) for query in zip(matrix, right, strict=True)]
        for k in RECALLS:
            expected = np.mean([recalls[k] for recalls, _ in truth])
            assert ranks.reached(k) == pytest.approx(expected, abs=1e-12)
            low, high = ranks.bounds(k)
            assert low - 1e-12 <= ranks.reached(k) <= high + 1e-12
        assert ranks.mean() == pytest.approx(np.mean([rank for _, rank in truth]), abs=1e-12)


@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
def test_tiles_change_nothing(tile: int) -> None:
    images, image_of_text = unit(50, 8, 0), torch.arange(130) % 50
    texts = unit(130, 8, 1)
    whole = rank_all(images, texts, image_of_text, tile=4096)
    for got, want in zip(rank_all(images, texts, image_of_text, tile=tile), whole, strict=True):
        assert got.better.equal(want.better)
        assert got.tied.equal(want.tied)
        assert got.right.equal(want.right)


def test_an_image_drawn_twice_is_one_tie_in_any_tile() -> None:
    images = unit(33, 48, 0)
    images[32] = images[3]
    i2t, t2i = rank_all(images, images.clone(), torch.arange(33), tile=5)
    for ranks in (i2t, t2i):
        assert ranks.tied.nonzero().flatten().tolist() == [3, 32]
        assert ranks.reached(1) == pytest.approx(32 / 33)
    metrics = retrieval_metrics(images, images, torch.arange(33))
    assert metrics["tied"] == pytest.approx(100 * 2 / 33)
    assert metrics["rsum_max"] - metrics["rsum_min"] == pytest.approx(2 * 100 * 2 / 33)


@pytest.mark.parametrize("rows", [list(range(12)), [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 6, 6, 6], [0, 0]])
def test_collapsed_features_score_exactly_chance(rows: list[int]) -> None:
    image_of_text = torch.tensor(rows)
    same = unit(1, 64, 0)
    metrics = retrieval_metrics(
        same.repeat(max(rows) + 1, 1), same.repeat(len(rows), 1), image_of_text
    )
    for name, value in chance(image_of_text, max(rows) + 1).items():
        assert metrics[name] == pytest.approx(value, abs=1e-12), name


def test_chance_in_closed_form() -> None:
    expected = chance(torch.arange(5000) // 5, 1000)
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
    expected = chance(image_of_text, 1000)
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
        ([0, 1, 2, 3], "holds 3, but there are 3 images"),
        ([0, 1, 1, 0], "1 of 3 images have no text, the first is row 2"),
        ([0, 1, 2, -1], "holds -1; rows start at 0"),
        ([], "nothing to retrieve"),
    ],
)
def test_rows_that_do_not_fit(rows: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        retrieval_metrics(unit(3, 4, 0), unit(4, 4, 1), torch.tensor(rows, dtype=torch.int64))


def test_widths_that_differ() -> None:
    with pytest.raises(UserError, match=r"\(3, 4\) and \(3, 5\); give \(n, d\) and \(m, d\)"):
        retrieval_metrics(unit(3, 4, 0), unit(3, 5, 0), torch.arange(3))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 9), st.integers(1, 90), st.integers(1, 99), st.integers(1, 60))
def test_top_k_is_the_head_of_a_stable_sort(q: int, n: int, k: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(q + 10 * n)
    queries = torch.randint(-1, 2, (q, 3), generator=generator).float()
    gallery = torch.randint(-1, 2, (n, 3), generator=generator).float()
    scores, rows = top_k(queries, gallery, k, tile=tile)
    want, order = (queries @ gallery.T).double().sort(dim=1, descending=True, stable=True)
    assert rows.equal(order[:, :k])
    assert scores.equal(want[:, :k])


def test_top_k_of_none() -> None:
    with pytest.raises(UserError, match=r"k \(0\) must be at least 1"):
        top_k(unit(2, 4, 0), unit(3, 4, 0), 0)


def test_warns_of_collapse_on_the_side_that_collapsed() -> None:
    spread, point = unit(20, 8, 0), unit(1, 8, 1).repeat(20, 1)
    assert check_features(spread, spread) == []
    (warning,) = check_features(spread, point)
    assert warning.startswith("the text features have collapsed")
    assert check_features(point[:1], spread) == []  # one image says nothing
