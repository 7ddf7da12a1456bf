"""The dense losses: oracles that are written another way, and closed cases."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_vse.losses.reference import first_argmax
from dist_vse.losses.registry import find_loss
from tests.support.loss_cases import NAMES, dense_loss

BIAS = torch.tensor([-3.0], dtype=torch.float64)


def features(count: int, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    images, texts = functional.normalize(made, dim=2).unbind()
    return images, texts


def log_scale(temperature: float) -> Tensor:
    return torch.tensor([-math.log(temperature)], dtype=torch.float64)


def test_convse_is_the_unhalved_sum_of_two_cross_entropies() -> None:
    images, texts = features(9)
    logits, target = images @ texts.T / 0.1, torch.arange(9)
    expected = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    loss = dense_loss("convse", images, texts, log_scale(0.1), BIAS)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    half = dense_loss("info_nce", images, texts, log_scale(0.1), BIAS)
    torch.testing.assert_close(half, expected / 2, rtol=1e-12, atol=0)


def test_convse_plus_plus_is_the_max_hinge_of_vse_plus_plus_over_n_t() -> None:
    images, texts = features(9)
    scores = images @ texts.T
    diagonal = scores.diag().view(-1, 1)
    own = torch.eye(9, dtype=torch.bool)
    cost_s = (0.2 + scores - diagonal).clamp(min=0).masked_fill(own, 0).max(1)[0].sum()
    cost_im = (0.2 + scores - diagonal.T).clamp(min=0).masked_fill(own, 0).max(0)[0].sum()
    vse = dense_loss("vse++", images, texts, log_scale(0.1), BIAS)
    torch.testing.assert_close(vse, cost_s + cost_im, rtol=1e-12, atol=0)
    convse = dense_loss("convse++", images, texts, log_scale(0.1), BIAS)
    torch.testing.assert_close(convse, vse / (9 * 0.1), rtol=1e-12, atol=0)


def test_convse_plus_plus_is_the_log_ratio_of_its_paper() -> None:
    images, texts = features(6)
    t, m, s = 0.1, 0.2, images @ texts.T
    total = 0.0
    for scores in (s, s.T):
        hardest = scores.masked_fill(torch.eye(6, dtype=torch.bool), -2).amax(1)
        ratio = (scores.diag() / t).exp() / ((hardest + m) / t).exp()
        total += (-ratio.log()).clamp(min=0).mean()
    loss = dense_loss("convse++", images, texts, log_scale(t), BIAS, margin=m)
    torch.testing.assert_close(loss, torch.as_tensor(total), rtol=1e-12, atol=0)


def test_siglip_and_vse0_equal_loops_over_pairs() -> None:
    images, texts = features(4)
    s = (images @ texts.T).tolist()
    sigmoid = hinge = 0.0
    for i in range(4):
        for j in range(4):
            z = (s[i][j] / 0.1 + BIAS.item()) * (1 if i == j else -1)
            sigmoid += math.log1p(math.exp(-z)) / 4
            if i != j:
                hinge += max(0.0, 0.2 + s[i][j] - s[i][i]) + max(0.0, 0.2 + s[i][j] - s[j][j])
    siglip = dense_loss("siglip", images, texts, log_scale(0.1), BIAS)
    assert siglip.item() == pytest.approx(sigmoid, rel=1e-12)
    vse0 = dense_loss("vse0", images, texts, log_scale(0.1), BIAS)
    assert vse0.item() == pytest.approx(hinge, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_pair_has_no_negatives(name: str) -> None:
    images, texts = (x.requires_grad_() for x in features(1))
    loss = dense_loss(name, images, texts, log_scale(0.1), BIAS)
    grad = torch.autograd.grad(loss, images)[0]
    assert torch.isfinite(grad).all()
    if not find_loss(name).learns_bias:
        assert loss.item() == 0
        assert not grad.any()


def test_excluded_duplicates_are_as_if_they_were_not_there() -> None:
    images, texts = features(5)
    ids = torch.tensor([7, 8, 9, 10, 7])
    logits = images @ texts.T / 0.1
    logits[0, 4] = logits[4, 0] = -torch.inf
    target = torch.arange(5)
    expected = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    loss = dense_loss("convse", images, texts, log_scale(0.1), BIAS, image_ids=ids)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_positive_duplicates_average_the_log_probabilities() -> None:
    images, texts = features(4)
    logits = images @ texts.T / 0.1
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    expected = -(rows.diag() + columns.diag())
    expected[0] = -(rows[0, [0, 3]].mean() + columns[[0, 3], 0].mean())
    expected[3] = -(rows[3, [0, 3]].mean() + columns[[0, 3], 3].mean())
    loss = dense_loss(
        "convse",
        images,
        texts,
        log_scale(0.1),
        BIAS,
        text_ids=torch.tensor([1, 2, 3, 1]),
        duplicates="positive",
    )
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-12, atol=0)


def test_among_equal_negatives_the_lowest_index_gets_the_gradient() -> None:
    images, texts = features(6)
    texts = texts[[0, 1, 2, 3, 3, 3]].clone().requires_grad_()
    images[0] = texts[3].detach()  # the hardest negative of image 0 is there three times
    s = images[:1] @ texts.T
    negative = torch.arange(6).view(1, -1) > 0
    loss = s.gather(1, first_argmax(s.masked_fill(~negative, -torch.inf), 1)).sum()
    grad = torch.autograd.grad(loss, texts)[0]
    assert grad.abs().sum(1).nonzero().view(-1).tolist() == [3]


def test_the_weight_goes_from_the_mean_of_violations_to_the_hardest() -> None:
    images, texts = features(8)
    losses = [
        dense_loss("vse++", images, texts, log_scale(0.1), BIAS, hard_negative_weight=h).item()
        for h in (0.0, 0.25, 1.0)
    ]
    assert losses[0] < losses[2]
    assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-12)
