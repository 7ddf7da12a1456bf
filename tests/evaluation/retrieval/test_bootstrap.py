"""Bootstrap intervals: around the metric, of the width that its queries allow."""

import math

import pytest
import torch

from dist_vse.evaluation.retrieval import intervals, own_pairs, rank_all
from tests.support.vectors import unit


def test_intervals_hold_the_metric_and_shrink_with_the_root_of_the_queries() -> None:
    widths = []
    for n in (100, 1600):
        rows = torch.arange(2 * n) // 2
        images = unit(n, 32, 0)
        texts = torch.nn.functional.normalize(images[rows] + 2 * unit(2 * n, 32, 1))
        ranks = rank_all(images, texts, own_pairs(rows))
        found = intervals([(*ranks, rows)], resamples=400)
        assert found == intervals([(*ranks, rows)], resamples=400)  # seeded
        low, high = found["t2i_r10"]
        share = ranks[1].reached(10)
        assert low < 100 * share < high
        if n == 1600:  # two captions an image, hardly correlated: about a binomial's
            binomial = 2 * 1.96 * 100 * math.sqrt(share * (1 - share) / (2 * n))
            assert high - low == pytest.approx(binomial, rel=0.25)
        low, high = found["i2t_r1"]
        widths.append(high - low)
    assert 0.1 < widths[1] / widths[0] < 0.5


def test_captions_of_one_image_are_no_independent_queries() -> None:
    """Ten equal captions an image: the interval is that of the images, not of the captions."""
    n = 200
    rows = torch.arange(10 * n) // 10
    images = unit(n, 16, 0)
    texts = torch.nn.functional.normalize(images + 1.5 * unit(n, 16, 1))[rows]
    ranks = rank_all(images, texts, own_pairs(rows))
    low, high = intervals([(*ranks, rows)], resamples=400)["t2i_r1"]
    share = ranks[1].reached(1)
    of_images = 2 * 1.96 * 100 * math.sqrt(share * (1 - share) / n)
    assert high - low == pytest.approx(of_images, rel=0.25)
