"""Ranks and mAP@R against brute force: under ties, in float64's order, for any tile and share."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dist_vse.evaluation.retrieval import (
    RECALLS,
    Ranks,
    content_pairs,
    own_pairs,
    rank_all,
    retrieval_metrics,
    scoring,
)
from tests.support.vectors import unit


def mean_over_tie_orders(
    scores: NDArray[np.float64], right: NDArray[np.bool_]
) -> tuple[dict[int, float], float, float]:
    """Recalls, rank and mAP@R of one query, as the mean over every order of the items."""
    ranks, precisions = [], []
    places = int(right.sum())
    for order in itertools.permutations(range(len(scores))):
        listed = right[sorted(order, key=lambda item: -scores[item])]  # stable: `order` breaks ties
        ranks.append(1 + int(listed.argmax()))
        upto = listed.cumsum() / np.arange(1, len(listed) + 1)
        precisions.append((upto * listed)[:places].sum() / places)
    recalls = {k: float(np.mean([r <= k for r in ranks])) for k in RECALLS}
    return recalls, float(np.mean(ranks)), float(np.mean(precisions))


@st.composite
def tied_problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Few small whole numbers as features, so that many scores are equal; any right pairs."""
    n, m = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    few = st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, m - 1)), max_size=10)
    pairs = draw(few)
    pairs |= {(i, draw(st.integers(0, m - 1))) for i in {*range(n)} - {i for i, _ in pairs}}
    pairs |= {(draw(st.integers(0, n - 1)), j) for j in {*range(m)} - {j for _, j in pairs}}
    values = st.lists(st.integers(-1, 1), min_size=2, max_size=2)
    images = draw(st.lists(values, min_size=n, max_size=n))
    texts = draw(st.lists(values, min_size=m, max_size=m))
    return torch.tensor(images).float(), torch.tensor(texts).float(), torch.tensor([*pairs]).T


@settings(deadline=None, max_examples=80)
@given(tied_problems(), st.integers(1, 4), st.integers(1, 4))
def test_ties_count_as_the_mean_over_their_orders(
    problem: tuple[Tensor, Tensor, Tensor], height: int, width: int
) -> None:
    images, texts, pairs = problem
    scores = (images @ texts.T).double().numpy()
    own = np.zeros_like(scores, dtype=bool)
    own[pairs[0], pairs[1]] = True
    for ranks, matrix, right in zip(
        rank_all(images, texts, pairs, tile=(height, width)),
        (scores, scores.T),
        (own, own.T),
        strict=True,
    ):
        truth = [mean_over_tie_orders(*query) for query in zip(matrix, right, strict=True)]
        for k in RECALLS:
            expected = np.mean([recalls[k] for recalls, _, _ in truth])
            assert ranks.reached(k) == pytest.approx(expected, abs=1e-12)
            low, high = ranks.bounds(k)
            assert low - 1e-12 <= ranks.reached(k) <= high + 1e-12
        assert ranks.expected().tolist() == pytest.approx([rank for _, rank, _ in truth], abs=1e-12)
        assert ranks.precision.tolist() == pytest.approx([p for _, _, p in truth], abs=1e-12)


def by_sorting(images: Tensor, texts: Tensor, pairs: Tensor) -> list[list[float]]:
    """mAP@R of every query in both directions, from the sorted float64 matrix (no ties)."""
    scores = images.double() @ texts.double().T
    right = torch.zeros(scores.shape, dtype=torch.bool)
    right[pairs[0], pairs[1]] = True
    found = []
    for matrix, answers in ((scores, right), (scores.T, right.T)):
        listed = answers.gather(1, matrix.argsort(dim=1, descending=True)).double()
        upto = listed.cumsum(1) / torch.arange(1, listed.shape[1] + 1)
        counts = answers.sum(1)
        inside = torch.arange(listed.shape[1]) < counts[:, None]
        found.append(((upto * listed * inside).sum(1) / counts).tolist())
    return found


@pytest.mark.parametrize("tile", [(16, 40), (512, 2048)])
def test_mean_average_precision_with_many_right_answers(tile: tuple[int, int]) -> None:
    images, image_of_text = unit(60, 12, 0), torch.arange(420) % 60  # seven captions an image
    texts = torch.nn.functional.normalize(images[image_of_text] + 0.9 * unit(420, 12, 1))
    more = torch.stack([torch.arange(60), (torch.arange(60) * 7 + 31) % 420])
    pairs = torch.cat([own_pairs(image_of_text), more], 1).unique(dim=1)
    for ranks, want in zip(
        rank_all(images, texts, pairs, tile=tile), by_sorting(images, texts, pairs), strict=True
    ):
        assert ranks.precision.tolist() == pytest.approx(want, abs=1e-12)
        assert 0.2 < ranks.precision.mean() < 0.98


@pytest.mark.parametrize("same_features", [True, False])
def test_many_equal_captions_against_the_whole_matrix(same_features: bool) -> None:
    """Three quarters of the captions are equal, so queries have 90 right answers; some ties."""
    generator = torch.Generator().manual_seed(0)
    images, rows = unit(120, 6, 0), torch.arange(120)
    images[40:60] = images[20:40]
    texts = torch.nn.functional.normalize(images + 0.6 * unit(120, 6, 1))
    equal = torch.rand(120, generator=generator) < 0.75
    texts[equal] = texts[equal][0] if same_features else texts[equal]
    texts[100:110] = texts[90:100]
    pairs = content_pairs(rows, rows, torch.where(equal, -1, rows))
    assert pairs.shape[1] > 80**2
    right = torch.zeros(120, 120, dtype=torch.bool)
    right[pairs[0], pairs[1]] = True
    scores = images.double() @ texts.double().T
    for ranks, matrix, answers in zip(
        rank_all(images, texts, pairs, tile=(50, 30)),
        (scores, scores.T),
        (right, right.T),
        strict=True,
    ):
        for query in range(120):
            own, wrong = matrix[query][answers[query]], matrix[query][~answers[query]]
            best = own.max()
            assert ranks.better[query] == (wrong > best + 1e-12).sum()
            assert ranks.tied[query] == ((wrong - best).abs() <= 1e-12).sum()
            assert ranks.right[query] == ((own - best).abs() <= 1e-12).sum()
            want = mean_precision(own.tolist(), wrong.tolist())
            assert ranks.precision[query] == pytest.approx(want, abs=1e-12)


def mean_precision(own: list[float], wrong: list[float]) -> float:
    """Expected mAP@R of one query, place by place of every tie."""
    groups: list[list[bool]] = []
    last = math.inf
    for score, right in sorted([(-s, True) for s in own] + [(-s, False) for s in wrong]):
        if not groups or score - last > 1e-12:
            groups.append([])
        groups[-1].append(right)
        last = score
    total, before, found = 0.0, 0, 0
    for group in groups:
        size, right = len(group), sum(group)
        for t in range(1, size + 1):
            if before + t <= len(own):
                upto = found + 1 + ((t - 1) * (right - 1) / (size - 1) if size > 1 else 0)
                total += right / size * upto / (before + t)
        before, found = before + size, found + right
    return total / len(own)


def test_the_chance_of_a_hit_in_long_ties() -> None:
    sizes = (0, 1, 3, 16, 17, 40, 300)
    cases = [(b, w, r) for b in (0, 2, 25) for w in sizes for r in sizes if r]
    better, wrong, right = torch.tensor(cases).T
    ranks = Ranks(better, wrong, right, torch.zeros(len(cases)))
    for k in (1, 5, 10, 20, 50, 333):
        for (b, w, r), got in zip(cases, ranks.hits(k).tolist(), strict=True):
            places = min(max(k - b, 0), w + r)
            want = 1 - math.comb(w + r - places, r) / math.comb(w + r, r)
            assert got == pytest.approx(want, abs=1e-11), (b, w, r, k)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3, 1e-4, 1e-8])
def test_decisions_are_those_of_float64(spread: float) -> None:
    """Scores much closer than float32 can distinguish, and hardly any tie."""
    images = torch.nn.functional.normalize(unit(1, 64, 0) + spread * unit(90, 64, 1)).double()
    texts = torch.nn.functional.normalize(unit(1, 64, 0) + spread * unit(180, 64, 2)).double()
    images = images + spread * 1e-3 * unit(90, 64, 3).double()
    texts = texts + spread * 1e-3 * unit(180, 64, 4).double()
    scores, rows = images @ texts.T, torch.arange(180) % 90
    i2t, t2i = rank_all(images, texts, own_pairs(rows), tile=(32, 64))
    own = scores[rows, torch.arange(180)]
    assert t2i.better.equal((scores > own + 1e-12).sum(0))
    best = torch.stack([own[:90], own[90:]]).amax(0)
    wrong = scores.clone()
    wrong[rows, torch.arange(180)] = -9
    assert i2t.better.equal((wrong > best[:, None] + 1e-12).sum(1))
    if spread in (1e-2, 1e-3):  # many right answers, most in doubt and hardly any a tie
        many = torch.rand(90, 180, generator=torch.Generator().manual_seed(5)) < 0.3
        pairs = (many | (torch.arange(180) % 90 == torch.arange(90)[:, None])).nonzero().T
        for ranks, want in zip(
            rank_all(images, texts, pairs, tile=(32, 64)),
            by_sorting(images, texts, pairs),
            strict=True,
        ):
            assert ranks.precision.tolist() == pytest.approx(want, abs=1e-12)


def same(got: Ranks, want: Ranks) -> bool:
    """Equal to the bit."""
    return all(torch.equal(getattr(got, name), getattr(want, name)) for name in vars(want))


@pytest.mark.parametrize("tile", [(1, 1), (7, 3), (64, 100), (9, 1000)])
def test_tiles_change_nothing(tile: tuple[int, int]) -> None:
    images, pairs = unit(50, 8, 0), own_pairs(torch.arange(130) % 50)
    texts = unit(130, 8, 1)
    whole = rank_all(images, texts, pairs)
    for got, want in zip(rank_all(images, texts, pairs, tile=tile), whole, strict=True):
        assert same(got, want)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_add_up_to_the_whole(world_size: int) -> None:
    images, pairs = unit(50, 8, 0), own_pairs(torch.arange(130) % 50)
    texts = unit(130, 8, 1)
    texts[40] = texts[3]
    tile = (8, 32)
    parts: list[list[Tensor]] = []
    for rank in range(world_size):
        seen: list[Tensor] = []
        keep = lambda counts, seen=seen: seen.append(counts.clone()) or counts  # noqa: E731
        rank_all(images, texts, pairs, tile=tile, share=(rank, world_size), add_up=keep)
        parts.append(seen)
    sums = iter([sum(part[side] for part in parts) for side in (0, 1)])
    add_up = lambda counts: counts.copy_(next(sums))  # noqa: E731
    got = rank_all(images, texts, pairs, tile=tile, share=(0, world_size), add_up=add_up)
    for one, want in zip(got, rank_all(images, texts, pairs), strict=True):
        for name in ("better", "tied", "right"):
            assert getattr(one, name).equal(getattr(want, name))
        assert one.precision.equal(want.precision)


def test_an_image_drawn_twice_is_one_tie_in_any_tile() -> None:
    images = unit(33, 48, 0)
    images[32] = images[3]
    i2t, t2i = rank_all(images, images.clone(), own_pairs(torch.arange(33)), tile=(5, 4))
    for ranks in (i2t, t2i):
        assert ranks.tied.nonzero().flatten().tolist() == [3, 32]
        assert ranks.reached(1) == pytest.approx(32 / 33)
    metrics = retrieval_metrics(images, images, torch.arange(33))
    assert metrics["tied"] == pytest.approx(100 * 2 / 33)
    assert metrics["rsum_max"] - metrics["rsum_min"] == pytest.approx(2 * 100 * 2 / 33)


@pytest.mark.parametrize("width", [1, 8, 256, 257, 2048, 8192])
def test_the_bound_holds_for_the_worst_sums(width: int) -> None:
    """Equal signs and sizes round the most; the bound grows with the parts that are added."""
    assert scoring._rounding(width) >= 1.05 * (min(width, 256) + width // 256) * 2.0**-24
    generator = torch.Generator().manual_seed(0)
    for images in (torch.ones(4, width), torch.rand(64, width, generator=generator)):
        images = torch.nn.functional.normalize(images)
        exact = images.double() @ images.double().T
        assert (scoring._about(images, images).double() - exact).abs().max() <= scoring._rounding(
            width
        )


def test_scores_are_multiplied_in_whole_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    about = scoring._about

    def spy(images: Tensor, texts: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return about(images, texts)

    monkeypatch.setattr(scoring, "_about", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        rank_all(unit(5, 8, 0), unit(5, 8, 1), own_pairs(torch.arange(5)))
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_ties_with_the_last_right_answer_is_found_below_its_rounding() -> None:
    """Equal in float64, and about half of the wrong ones are less in float32."""
    images = unit(64, 32, 0).repeat_interleave(2, 1) / 2**0.5  # pairs of equal numbers
    noise = torch.nn.functional.normalize(
        unit(64, 64, 1) - images * (unit(64, 64, 1) * images).sum(1, True)
    )
    second = 0.7 * images + 0.7 * noise
    wrong = second.unflatten(1, (32, 2)).flip(2).flatten(1)  # each pair swapped: the same score
    texts, rows = torch.cat([images, second, wrong]), torch.arange(64)
    pairs = torch.cat([own_pairs(rows), torch.stack([rows, rows + 64])], 1)
    pairs = torch.cat([pairs, torch.stack([rows + 64, rows + 128])], 1)
    i2t, _ = rank_all(torch.cat([images, unit(64, 64, 2)]), texts, pairs)
    assert i2t.precision[:64].tolist() == pytest.approx([0.75] * 64)  # mean of its two orders
