"""The losses over the global batch on one process: against the dense ones, and at the edges."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dist_vse.common import cpu
from dist_vse.common.errors import UserError
from dist_vse.common.memory import measure
from tests.support.loss_cases import NAMES, Case, dense_loss, error, global_loss, gradients

torch.set_num_threads(1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    count=st.integers(1, 23),
    tile=st.integers(1, 30),
    temperature=st.sampled_from([1.0, 0.1, 0.02, 0.005]),
    groups=st.integers(1, 30),
    duplicates=st.sampled_from(["mask", "positive", "keep"]),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    kept=st.sampled_from([0.0, 4e-7, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_equals_the_dense_loss_in_float64(
    name: str,
    count: int,
    tile: int,
    temperature: float,
    groups: int,
    duplicates: str,
    weight: float,
    kept: float,
    seed: int,
) -> None:
    case = Case(
        name, count, temperature=temperature, groups=groups, duplicates=duplicates,
        weight=weight, seed=seed,
    )  # fmt: skip
    ours = gradients(global_loss, case, tile=tile, memory_gib=kept)
    assert error(ours, gradients(dense_loss, case)) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_dense_loss_in_float32(name: str) -> None:
    for temperature, duplicates in itertools.product((0.1, 0.01), ("mask", "positive")):
        case = Case(name, 70, temperature=temperature, duplicates=duplicates, groups=60, width=64)
        exact = gradients(dense_loss, case)
        ours = gradients(global_loss, case, dtype=torch.float32, tile=16)
        assert error(ours, exact) < 1e-5, (temperature, duplicates)


def test_equals_the_dense_loss_where_torch_has_no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_onednn", None)
    for name in ("convse", "convse++"):
        case = Case(name, 70, groups=60, width=64)
        ours = gradients(global_loss, case, dtype=torch.float32, tile=16)
        assert error(ours, gradients(dense_loss, case)) < 1e-5, name


def test_onednns_products_get_no_features_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    product = cpu._onednn
    if product is None:
        pytest.skip("this torch has no oneDNN")

    def looked_at(left: Tensor, right: Tensor, *settings: object) -> Tensor:
        assert left.is_contiguous() and (right.is_contiguous() or right.T.is_contiguous())
        return product(left, right, *settings)  # type: ignore[no-any-return]

    monkeypatch.setattr(cpu, "_onednn", looked_at)
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 70, 64, generator=generator)[:, :, :48].requires_grad_()
    global_loss("convse", images, texts, torch.zeros(1), torch.zeros(1), tile=16).loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_tile_changes_nothing(name: str) -> None:
    case = Case(name, 40, groups=35)
    without = gradients(global_loss, case, dtype=torch.float32, tile=16, memory_gib=0)
    for gib in (32 * 12 * 4 / 2**30, 1.0):
        kept = gradients(global_loss, case, dtype=torch.float32, tile=16, memory_gib=gib)
        assert all(torch.equal(a, b) for a, b in zip(without, kept, strict=True))


def test_no_more_tiles_are_kept_than_the_budget_has_room_for() -> None:
    case, tile = Case("convse", 96), 32 * 12 * 4

    def held(budget: float) -> int:
        leaves = case.leaves(torch.float32)  # the loss must live: its graph has the tiles
        loss, bytes_ = measure(
            lambda: case.differentiable(
                global_loss, leaves, tile=16, memory_gib=budget * tile / 2**30
            ),
            torch.device("cpu"),
        )
        return bytes_.held if loss.requires_grad else 0

    for budget, kept in ((0.9, 0), (1, 1), (3.5, 3), (24, 24), (99, 24)):
        assert held(budget) - held(0) == kept * tile, budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_finite_at_low_temperatures_in_every_precision(name: str, dtype: torch.dtype) -> None:
    for temperature in (0.1, 0.01, 0.005):
        case = Case(name, 12, temperature=temperature)
        loss, *grads = gradients(global_loss, case, dtype=dtype, tile=5)
        assert torch.isfinite(loss)
        assert loss.dtype == torch.float32
        assert grads[0].dtype == dtype
        assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", ["convse", "info_nce", "dcl"])
@pytest.mark.parametrize("far", [False, True])
def test_sums_of_powers_neither_overflow_nor_vanish(name: str, far: bool) -> None:
    """At t = 0.0115 a power of 2 is within float32's range, a sum of 16 is not.

    With `far`, one row is near its captions and all others are opposite to them: with one shift
    for all pairs, their sums would vanish.
    """
    case = Case(name, 16, temperature=0.0115)
    if far:
        case.texts = case.texts[:1].expand(16, -1).clone()
        case.images = case.texts.clone()
        case.images[1:] *= -1
    else:
        case.texts[:10] = case.images[:10] = case.images[:1].clone()
    exact = gradients(dense_loss, case)
    for tile in (4, 64):
        ours = gradients(global_loss, case, dtype=torch.float32, tile=tile)
        assert error(ours, exact) < 1e-3, (tile, error(ours, exact))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_around_it_changes_nothing(name: str) -> None:
    case = Case(name, 12)
    plain = gradients(global_loss, case, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(global_loss, case, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_single_pair(name: str) -> None:
    loss, *grads = gradients(global_loss, Case(name, 1))
    assert all(torch.isfinite(grad).all() for grad in grads)
    if name != "siglip":
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert all(grad.abs().max() < 1e-12 for grad in grads)


@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_not_finite_make_a_loss_that_is_not(name: str) -> None:
    for bad in (math.nan, math.inf):
        case = Case(name, 8)
        case.texts[5, 0] = bad
        loss = case.run(global_loss, tile=3)
        assert not torch.isfinite(loss)


def test_the_hardest_among_copies_is_the_first_for_any_tile() -> None:
    images, texts = Case("vse++", 48, width=64).to(torch.float32)
    texts = texts[torch.arange(48) % 7]  # seven captions, again and again
    images = images[torch.arange(48) % 5]
    results = []
    for tile in (1, 7, 16, 48):
        leaves = images.clone().requires_grad_(), texts.clone().requires_grad_()
        loss = global_loss(
            "vse++", *leaves, torch.zeros(1), torch.zeros(1), margin=2.0, tile=tile
        ).loss
        results.append(torch.autograd.grad(loss, leaves))
    for grads in results[1:]:
        torch.testing.assert_close(grads, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [None, 512, 200, 64])
def test_the_hardest_is_found_in_blocks_of_any_size(tile: int | None) -> None:
    """Whole tiles and cut ones, strips of several, and duplicates among what is searched."""
    for groups in (10**6, 611):
        case = Case("convse++", 1111, groups=groups, width=16)
        ours = gradients(global_loss, case, tile=tile)
        assert error(ours, gradients(dense_loss, case)) < 1e-10


@pytest.mark.parametrize("name", ["convse", "convse++"])
def test_bf16_products_stay_near(name: str) -> None:
    case = Case(name, 64, width=64, temperature=0.1)
    exact = gradients(dense_loss, case)
    rounded = gradients(global_loss, case, dtype=torch.float32, tile=16, bf16_products=True)
    assert 1e-6 < error(rounded[:1], exact[:1]) < 2e-2
    cosine = functional.cosine_similarity(rounded[1].double().view(-1), exact[1].view(-1), dim=0)
    assert cosine > (0.999 if name == "convse" else 0.9)


def test_nothing_is_kept_without_a_gradient() -> None:
    case = Case("convse", 30)
    with torch.no_grad():
        plain = case.run(global_loss)
    assert not plain.requires_grad
    assert plain.item() == pytest.approx(case.run(dense_loss).item(), rel=1e-12)


def test_the_gradient_can_be_taken_twice() -> None:
    case = Case("siglip", 20)
    leaves = case.leaves(torch.float64)
    loss = global_loss("siglip", *leaves, tile=8).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_equal_their_definitions(name: str) -> None:
    case = Case(name, 40, groups=33)
    stats = case.output(tile=16).stats
    s = case.images @ case.texts.T
    own = torch.eye(40, dtype=torch.bool)
    duplicates = (case.ids.view(-1, 1) == case.ids) & ~own
    hardest = s.masked_fill(own | duplicates, -1).amax(1)
    expected = {
        "positive_similarity": s.diag().mean(),
        "hardest_similarity": hardest.mean(),
        "active_share": (hardest > s.diag() - 0.2).double().mean(),
        "alignment": (case.images - case.texts).square().sum(1).mean(),
        "uniformity": (_closeness(case.images) / 2 + _closeness(case.texts) / 2).log(),
        "masked_pairs": duplicates.sum().double(),
        "masked_share": duplicates.sum() / (40 * 39),
        "temperature": torch.tensor(0.1),
    }
    assert stats.keys() == expected.keys()
    for key, value in expected.items():
        assert stats[key].item() == pytest.approx(value.item(), rel=1e-6), key
        assert stats[key].shape == ()
        assert not stats[key].requires_grad


def _closeness(x: Tensor) -> Tensor:
    return torch.pdist(x).square().mul(-2).exp().mean()


def test_what_does_not_fit_together_is_told() -> None:
    x, one = torch.randn(4, 3), torch.zeros(1)
    with pytest.raises(UserError, match=r"'convs' is unknown; did you mean 'convse'"):
        global_loss("convs", x, x, one, one)
    with pytest.raises(UserError, match=r"\(4, 3\).*\(3, 3\)"):
        global_loss("convse", x, x[:3], one, one)
    with pytest.raises(UserError, match=r"int64, one a row \(4 rows\)"):
        global_loss("convse", x, x, one, one, image_ids=torch.arange(3))
    with pytest.raises(UserError, match=r"hard_negative_weight \(2"):
        global_loss("vse++", x, x, one, one, hard_negative_weight=2.0)
