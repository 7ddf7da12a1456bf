"""Texts without an image: equal to one process that holds all N x (N + M) similarities."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.losses.registry import LOSSES
from tests.support.distributed import run_distributed
from tests.support.loss_cases import NAMES, Case, dense_loss, error, global_loss

ROWS = {1: (10,), 2: (7, 3), 3: (7, 0, 3)}
NEGATIVES = {1: (13,), 2: (4, 9), 3: (0, 11, 2)}  # of each rank
# Some are the captions of rows (their ids), and some the same text twice.
IDS = torch.tensor([50, 2, 51, 9, 2, 52, 53, 52, 0, 54, 55, 5, 56])


def _features(count: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    made = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return functional.normalize(made, dim=1)


def _part(counts: tuple[int, ...]) -> slice:
    start = sum(counts[: distributed.rank()])
    return slice(start, start + counts[distributed.rank()])


def _gradients(fn: Callable[..., Any], case: Case, part: slice, **options: Any) -> list[Tensor]:
    """Return the loss and its gradients in images, texts, negatives, scale and bias."""
    images, texts, scale, bias = case.leaves(torch.float64)
    negatives = _features(len(IDS))[part].clone().requires_grad_()
    leaves = [images, texts, negatives, scale, bias]
    more = {"negatives": negatives, "negative_ids": IDS[part], **options}
    loss = case.differentiable(fn, [images, texts, scale, bias], **more)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads]


def _errors() -> dict[str, float]:
    world_size = distributed.world_size()
    errors = {}
    for name, transport, duplicates, (temperature, weight, tile, kept) in itertools.product(
        NAMES,
        ("gather", "ring"),
        ("mask", "positive"),
        ((0.1, 1.0, 3, 0.0), (0.005, 0.4, 4, 1.0), (0.1, 0.0, 64, 0.0)),
    ):
        case = Case(
            name, 10, temperature=temperature, weight=weight, duplicates=duplicates, groups=8
        )
        exact = _gradients(dense_loss, case, slice(None))
        case.part = _part(ROWS[world_size])
        options = {"transport": transport, "tile": tile, "memory_gib": kept}
        loss, *features, scale, bias = _gradients(
            global_loss, case, _part(NEGATIVES[world_size]), **options
        )
        of_all = [distributed.all_gather_rows(x) / world_size for x in features]
        means = [distributed.all_reduce_mean(x.clone()) for x in (loss, scale, bias)]
        ours = [means[0], *of_all, *means[1:]]
        errors[f"{name} {transport} {duplicates} t={temperature} w={weight}"] = error(ours, exact)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "world_size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))]
)
def test_negatives_equal_one_process(world_size: int) -> None:
    for errors in run_distributed(_errors, world_size):
        assert len(errors) == len(NAMES) * 2 * 2 * 3
        assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("name", NAMES)
def test_negatives_change_the_rows_alone(name: str) -> None:
    """A negative far from all images gives nothing; one at an image gives its rows more."""
    case = Case(name, 6)
    images = case.images
    without = case.run(global_loss)
    far = case.run(global_loss, negatives=-100 * images.mean(0, True) / images.mean(0).norm())
    near = case.run(global_loss, negatives=images[:1])
    assert near > without
    if name != "siglip":  # its scale is not that of a softmax
        assert far.item() >= without.item() - 1e-12

    everything = case.run(dense_loss, negatives=images[:1])
    torch.testing.assert_close(near, everything)


def test_a_row_s_own_caption_is_no_negative_of_it() -> None:
    case = Case("convse", 4)
    twice = {"negatives": case.texts[2:3], "negative_ids": case.text_ids[2:3]}
    plain, masked = case.run(global_loss), case.run(global_loss, **twice)
    known = case.run(global_loss, negatives=case.texts[2:3])  # nobody says that it is the same
    assert plain < masked < known  # others have it as a negative twice


def test_no_negatives_at_all_change_no_bit() -> None:
    case = Case("convse", 5)
    none = torch.empty(0, 6, dtype=torch.float64)
    assert case.run(global_loss, negatives=none) == case.run(global_loss)


def _refusals() -> list[str]:
    case = Case("convse", 4)
    messages = []
    wrong: list[dict[str, Any]] = [
        {"negatives": torch.zeros(2, 5, dtype=torch.float64)},
        {"negatives": _features(2), "negative_ids": torch.zeros(3, dtype=torch.long)},
        {"negatives": _features(2)} if distributed.rank() == 0 else {},
    ]
    for arguments in wrong:
        with pytest.raises(UserError) as caught:
            case.run(global_loss, **arguments)
        messages.append(str(caught.value))
    return messages


def test_wrong_negatives_are_refused_on_all_ranks() -> None:
    first, second = run_distributed(_refusals, 2)
    assert first == second
    for message, part in zip(
        first, ("(2, 5) must be", "(3,) must be", "negatives is"), strict=True
    ):
        assert part in message


def test_a_loss_that_takes_none_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "convse", replace(LOSSES["convse"], takes_negatives=False))
    from dist_vse.losses.registry import find_loss

    find_loss.cache_clear()
    with pytest.raises(UserError, match=r"loss\.name=convse takes no negatives"):
        Case("convse", 4).run(global_loss, negatives=_features(2))
    monkeypatch.undo()
    find_loss.cache_clear()
