"""False negatives left out: equal to one process that masks the same pairs, on any ranks."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.losses.kernel_choice import choose_kernels
from dist_vse.losses.options import LossOptions
from tests.support.distributed import run_distributed
from tests.support.loss_cases import NAMES, Case, dense_loss, error, global_loss

ROWS = {1: (10,), 2: (7, 3), 3: (7, 0, 3)}
NEGATIVES = {1: (6,), 2: (2, 4), 3: (0, 5, 1)}
IDS = torch.tensor([50, 2, 51, 9, 2, 52])  # some are captions of rows


def _features(*shape: int, seed: int = 7) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(made, dim=-1)


def _part(counts: tuple[int, ...]) -> slice:
    start = sum(counts[: distributed.rank()])
    return slice(start, start + counts[distributed.rank()])


def _gradients(
    fn: Callable[..., Any], case: Case, part: slice, teacher: Tensor | None, **options: Any
) -> list[Tensor]:
    """Return the loss and its gradients in images, texts, negatives, scale and bias."""
    images, texts, scale, bias = case.leaves(torch.float64)
    negatives = _features(len(IDS), 6)[part].clone().requires_grad_()
    if teacher is not None:
        options["teacher"] = tuple(x[case.part] for x in teacher)
    more = {"negatives": negatives, "negative_ids": IDS[part], **options}
    loss = case.differentiable(fn, [images, texts, scale, bias], **more)
    leaves = [images, texts, negatives, scale, bias]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads]


def _errors() -> tuple[dict[str, float], list[float]]:
    """Return each case's error against one process, and how much leaving out changes the loss."""
    world_size = distributed.world_size()
    errors, changes = {}, []
    cases = itertools.product(NAMES, ("own", "teacher"), ("gather", "ring"), ("mask", "positive"))
    turns = itertools.cycle(((0.1, 1.0, 3, 0.0), (0.005, 0.4, 4, 1.0), (0.1, 0.0, 64, 0.0)))
    for (name, by, transport, duplicates), turn in zip(cases, turns, strict=False):
        temperature, weight, tile, kept = turn
        case = Case(
            name, 10, temperature=temperature, weight=weight, duplicates=duplicates, groups=8
        )
        teacher = _features(2, 10, 5) if by == "teacher" else None
        whole = slice(None)
        margin = {"ignore_above": 0.1}
        exact = _gradients(dense_loss, case, whole, teacher, **margin)
        changes.append(abs(exact[0] - _gradients(dense_loss, case, whole, None)[0]).item())
        case.part = _part(ROWS[world_size])
        options = {"transport": transport, "tile": tile, "memory_gib": kept, **margin}
        part = _part(NEGATIVES[world_size])
        loss, *features, scale, bias = _gradients(global_loss, case, part, teacher, **options)
        of_all = [distributed.all_gather_rows(x) / world_size for x in features]
        means = [distributed.all_reduce_mean(x.clone()) for x in (loss, scale, bias)]
        ours = [means[0], *of_all, *means[1:]]
        errors[f"{name} {by} {transport} {duplicates} t={temperature} w={weight}"] = error(
            ours, exact
        )
    return errors, changes


@pytest.mark.parametrize("world_size", [pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3)])
def test_without_near_pairs_equal_one_process(world_size: int) -> None:
    for errors, changes in run_distributed(_errors, world_size):
        assert len(errors) == len(NAMES) * 2 * 2 * 2
        # At t = 0.005 a softmax is nearly certain, and the dense loss itself has fewer digits.
        assert max(errors.values()) < 1e-8, errors
        assert min(changes) > 1e-6, changes


@pytest.mark.parametrize("by", ["own", "teacher"])
@pytest.mark.parametrize("name", NAMES)
def test_near_pairs_are_no_negatives(name: str, by: str) -> None:
    case = Case(name, 10, groups=8, weight=0.4)
    teacher = _features(2, 10, 5) if by == "teacher" else None
    whole, options = slice(None), {"ignore_above": 0.1}
    exact = _gradients(dense_loss, case, whole, teacher, **options)
    ours = _gradients(global_loss, case, whole, teacher, tile=3, **options)
    assert error(ours, exact) < 1e-10
    assert abs(exact[0] - _gradients(dense_loss, case, whole, None)[0]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_duplicates_as_positives_stay(name: str) -> None:
    case = Case(name, 10, groups=6, duplicates="positive", weight=0.4)
    whole, options = slice(None), {"ignore_above": 0.3}
    exact = _gradients(dense_loss, case, whole, None, **options)
    assert error(_gradients(global_loss, case, whole, None, tile=3, **options), exact) < 1e-10


def test_a_copy_of_the_caption_is_left_out_at_a_margin_of_0() -> None:
    """Its similarity is that of the own pair, but for the last bits."""
    case = Case("convse++", 64, width=48)
    case.texts[1] = case.texts[0]
    images, texts, scale, bias = case.leaves(torch.float32)
    options: dict[str, Any] = {"ignore_above": 0.0, "tile": 7, "margin": 2.0}
    output = global_loss("convse++", images, texts, scale, bias, **options)
    similar = (images @ texts.T).detach()
    limits = torch.minimum(similar.diagonal().unsqueeze(1), similar.diagonal()) - 1e-6
    near = (similar > limits).sum() - 64
    assert near >= 2 and output.stats["ignored_share"] == pytest.approx(near / (64 * 63))


def test_everything_may_be_left_out() -> None:
    case = Case("convse", 6)
    for name in NAMES:
        loss = global_loss(name, *case.leaves(torch.float64), ignore_above=2.5)
        dense = dense_loss(name, *case.leaves(torch.float64), ignore_above=2.5)
        torch.testing.assert_close(loss.loss.view(()), dense.view(()))
        assert loss.stats["ignored_share"] == 1


def test_no_option_changes_no_bit_and_no_statistic() -> None:
    case = Case("info_nce", 9)
    plain, far = case.output(), case.output(ignore_above=-9.0)
    assert torch.equal(plain.loss, far.loss)
    assert far.stats.keys() - plain.stats.keys() == {"ignored_share"}


def test_fused_kernels_leave_them_to_the_tiles() -> None:
    cpu = torch.device("cpu")
    wanted = LossOptions(ignore_above=0.1).only_tiled
    found = choose_kernels("tiled", True, torch.float32, cpu, only_tiled=wanted)
    assert found == ("tiled", "loss.kernels=tiled")
    assert LossOptions().only_tiled is None and wanted == "ignore_above is set"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ignore_above": float("nan")}, r"ignore_above \(nan\) must be a finite number"),
        ({"teacher": (torch.zeros(3, 2), torch.zeros(4, 2))}, r"the teacher's features \(3, 2\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Case("convse", 4).run(global_loss, **arguments)
