"""The loss over several widths: the mean of the losses of each, on any number of ranks."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import LossConfig, ModelConfig, TrainConfig
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.losses.nested import NestedLoss
from tests.support.distributed import run_distributed

WIDTHS = (4, 10)
N, D = 12, 16


def _leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    images, texts = normalize(features, dim=2).unbind()
    return [
        images.requires_grad_(),
        texts.requires_grad_(),
        *torch.tensor([[2.0], [-1.0]]).double(),
    ]


def _nested(name: str, first: int, rows: int, *, prefetch: bool) -> list[Tensor]:
    """Return the loss and the gradients in these rows."""
    images, texts, log_scale, bias = _leaves()
    images, texts = (x.detach()[first : first + rows].requires_grad_() for x in (images, texts))
    loss = NestedLoss([GlobalLoss(name) for _ in range(3)], WIDTHS)
    if prefetch:
        for chunk in texts.detach().split(2):
            loss.prefetch(chunk)
    output = loss(images, texts, log_scale, bias)
    assert {"loss_4", "loss_10", "uniformity"} <= output.stats.keys()
    return [output.loss.detach(), *torch.autograd.grad(output.loss, (images, texts))]


def _dense(name: str) -> list[Tensor]:
    images, texts, log_scale, bias = _leaves()
    cut = [(images, texts)]
    cut += [(normalize(images[:, :w]), normalize(texts[:, :w])) for w in WIDTHS]
    loss = torch.stack([dense_loss(name, i, t, log_scale, bias) for i, t in cut]).mean()
    return [loss.detach(), *torch.autograd.grad(loss, (images, texts))]


@pytest.mark.parametrize("name", ["convse", "convse++", "info_nce", "siglip"])
def test_the_loss_is_the_mean_over_the_widths(name: str) -> None:
    for prefetch in (False, True):
        found = _nested(name, 0, N, prefetch=prefetch)
        torch.testing.assert_close(found, _dense(name), rtol=1e-9, atol=1e-9)


def _on_a_rank(name: str) -> list[Tensor]:
    rows = N // distributed.world_size()
    return _nested(name, distributed.rank() * rows, rows, prefetch=True)


@pytest.mark.slow
def test_two_ranks_have_the_loss_and_gradients_of_one() -> None:
    expected = _dense("convse++")
    for rank, (loss, *grads) in enumerate(run_distributed(_on_a_rank, 2, "convse++")):
        torch.testing.assert_close(loss, expected[0], rtol=1e-9, atol=1e-9)
        for grad, whole in zip(grads, expected[1:], strict=True):
            rows = whole[rank * N // 2 : (rank + 1) * N // 2]
            torch.testing.assert_close(grad / 2, rows, rtol=1e-9, atol=1e-9)


def test_widths_must_be_smaller_than_the_features() -> None:
    for widths in ([16], [0], [4, 4]):
        with pytest.raises(UserError, match=r"loss.widths .* below model.embed_dim \(16\)"):
            TrainConfig(model=ModelConfig(embed_dim=16), loss=LossConfig(widths=widths))
