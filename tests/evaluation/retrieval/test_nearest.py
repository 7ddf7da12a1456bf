"""The nearest rows of a gallery."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vse.common.errors import UserError
from dist_vse.evaluation.retrieval import top_k
from tests.support.vectors import unit


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
