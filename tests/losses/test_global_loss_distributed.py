"""The losses over the global batch on several ranks: equal to one process that has it all.

One group of processes runs many cases. The gradient that a rank gets is W times that of one
process; scalars (scale, bias) are averaged over the ranks, as an engine does.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.losses.hardest import Best
from dist_vse.losses.registry import LOSSES
from dist_vse.tools.bench.traffic import bytes_sent
from tests.support.distributed import run_distributed
from tests.support.loss_cases import (
    NAMES,
    Case,
    dense_loss,
    error,
    global_loss,
    gradients,
    step_loss,
)

IN_BF16 = [name for name, spec in LOSSES.items() if spec.captions_in_bf16]
RAGGED = {1: (10,), 2: (7, 3), 3: (7, 3, 0), 4: (0, 6, 1, 3)}
EVEN = {1: (12,), 2: (6, 6), 3: (4, 4, 4), 4: (3, 3, 3, 3)}


def _whole(grads: list[Tensor]) -> list[Tensor]:
    """Turn a rank's loss and gradients into what one process would have."""
    loss, images, texts, *scalars = grads
    means = [distributed.all_reduce_mean(x.clone()) for x in (loss, *scalars)]
    features = [distributed.all_gather_rows(x) / distributed.world_size() for x in (images, texts)]
    return [means[0], *features, *means[1:]]


def _take_part(case: Case, counts: tuple[int, ...]) -> None:
    start = sum(counts[: distributed.rank()])
    case.part = slice(start, start + counts[distributed.rank()])


def _compare(
    shares: dict[int, tuple[int, ...]], dtype: torch.dtype, names: tuple[str, ...]
) -> dict[str, float]:
    """Return the error of each case against one process in float64."""
    counts = shares[distributed.world_size()]
    errors = {}
    for name, transport, duplicates, (temperature, weight, tile, kept) in itertools.product(
        names,
        ("gather", "ring"),
        ("mask", "positive", "keep"),
        ((0.1, 1.0, 3, 0.0), (0.005, 0.4, 4, 1.0), (0.1, 0.0, 64, 0.0)),
    ):
        case = Case(
            name,
            sum(counts),
            temperature=temperature,
            weight=weight,
            duplicates=duplicates,
            groups=8,
        )
        exact = gradients(dense_loss, case)
        _take_part(case, counts)
        options: dict[str, Any] = {"transport": transport, "tile": tile, "memory_gib": kept}
        ours = _whole(gradients(global_loss, case, dtype=dtype, **options))
        errors[f"{name} {transport} {duplicates} t={temperature} w={weight}"] = error(ours, exact)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "world_size", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]
)
def test_ragged_ranks_equal_one_process_in_float64(world_size: int) -> None:
    for errors in run_distributed(_compare, world_size, RAGGED, torch.float64, NAMES):
        assert len(errors) == len(NAMES) * 2 * 3 * 3
        assert max(errors.values()) < 1e-10, errors


@pytest.mark.slow
def test_one_pair_on_two_ranks() -> None:
    for errors in run_distributed(_compare, 2, {2: (0, 1)}, torch.float64, NAMES):
        assert max(errors.values()) < 1e-10, errors


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_even_ranks_equal_one_process(world_size: int) -> None:
    for errors in run_distributed(_compare, world_size, EVEN, torch.float64, NAMES):
        assert max(errors.values()) < 1e-10, errors
    for errors in run_distributed(_compare, world_size, EVEN, torch.float32, NAMES):
        assert max(errors.values()) < 1e-5, errors


def _low_temperature() -> dict[str, float]:
    """Return the error in float32 at a temperature whose powers float32 can't hold."""
    errors = {}
    for name in NAMES:
        case = Case(name, 9, temperature=0.005)
        exact = gradients(dense_loss, case)
        _take_part(case, {2: (0, 9), 3: (0, 2, 7)}[distributed.world_size()])
        ours = gradients(global_loss, case, dtype=torch.float32)
        errors[name] = error(_whole(ours), exact)
    return errors


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_first_rank_without_rows_at_a_low_temperature(world_size: int) -> None:
    """The bound of the similarities is that of all ranks, not of the first."""
    for errors in run_distributed(_low_temperature, world_size):
        assert max(errors.values()) < 2e-4, errors


def _join(values: list[list[float]]) -> tuple[list[float], list[int]]:
    """Join what each rank met, with a tolerance of 0.01: the values and their indices."""
    own = torch.tensor(values[distributed.rank()])
    best = Best(len(own), own, 0.01)
    for j, value in enumerate(own):
        best.update(value.view(1, 1), 1, slice(j, j + 1), 10 * distributed.rank() + j)
    best.join()
    return best.values.tolist(), best.indices.tolist()


def test_the_first_rank_among_nearly_equal_ones_has_the_hardest() -> None:
    """Copies on two ranks may differ in their last bits."""
    values = [[0.5, 0.5, 0.5], [0.505, 0.52, 0.4]]
    for found, indices in run_distributed(_join, 2, values):
        assert found == pytest.approx([0.505, 0.52, 0.5])
        assert indices == [0, 11, 2]


def _copies(transport: str) -> list[Tensor]:
    case = Case("convse++", 12, width=64)
    case.texts = case.texts[torch.arange(12) % 5]
    case.images = case.images[torch.arange(12) % 4]
    _take_part(case, EVEN[distributed.world_size()])
    case.options |= {"margin": 2.0}
    leaves = case.leaves(torch.float32)
    loss = global_loss(case.name, *leaves, **case.options, transport=transport, tile=5).loss
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return _whole([loss.detach(), *grads])


def test_among_copies_the_first_of_the_global_batch_is_the_hardest() -> None:
    expected = run_distributed(_copies, 1, "gather")[0]
    for world_size, transport in ((2, "ring"), (3, "ring"), (4, "gather")):
        for grads in run_distributed(_copies, world_size, transport):
            torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-5)


def _prefetched(transport: str, dtype: torch.dtype, bf16_products: bool) -> bool:
    case = Case("convse", 12, width=64)
    _take_part(case, EVEN[distributed.world_size()])
    leaves, found = case.leaves(dtype), []
    for prefetch in (False, True):
        options: dict[str, Any] = {"transport": transport, "tile": 5}
        options["bf16_products"] = bf16_products
        step = step_loss(case.name, **case.options, **options)
        if prefetch:
            for piece in leaves[1].split([1, len(leaves[1]) - 1]):
                step.prefetch(piece)
                distributed.barrier()  # other collectives may come between
        loss = step(*leaves).loss
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        found.append([loss.detach(), *grads])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("transport", "dtype", "bf16_products"),
    [
        ("gather", torch.float32, False),
        ("gather", torch.float32, True),
        ("gather", torch.bfloat16, False),
        ("ring", torch.float32, False),
    ],
)
def test_what_was_prefetched_gives_the_same_to_the_bit(
    world_size: int, transport: str, dtype: torch.dtype, bf16_products: bool
) -> None:
    assert all(run_distributed(_prefetched, world_size, transport, dtype, bf16_products))


def _one_bad_rank(name: str, transport: str) -> float:
    case = Case(name, 12)
    _take_part(case, EVEN[distributed.world_size()])
    if distributed.rank() == 1:
        case.images[case.part] = torch.nan
    return case.run(global_loss, transport=transport, tile=2).item()


@pytest.mark.slow
def test_a_bad_rank_is_seen_by_all() -> None:
    for name, transport in zip(NAMES, itertools.cycle(("gather", "ring")), strict=False):
        losses = run_distributed(_one_bad_rank, 2, name, transport)
        assert all(loss != loss for loss in losses), losses


def _statistics() -> dict[str, float]:
    case = Case("convse", 12, groups=8)
    _take_part(case, EVEN[distributed.world_size()])
    return {key: value.item() for key, value in case.output(tile=5).stats.items()}


def test_statistics_are_those_of_the_global_batch() -> None:
    expected = run_distributed(_statistics, 1)[0]
    assert expected["masked_pairs"] == 8
    for stats in run_distributed(_statistics, 3):
        # Uniformity is measured within each rank's own sample.
        for key in stats.keys() - {"uniformity"}:
            assert stats[key] == pytest.approx(expected[key], rel=1e-12), key


def _in_bf16(counts: tuple[int, ...]) -> dict[str, float]:
    """Return how far bfloat16 products are from one process in float64, captions rounded before."""
    errors = {}
    for name, transport, duplicates in itertools.product(
        IN_BF16, ("gather", "ring"), ("mask", "positive")
    ):
        case = Case(name, sum(counts), width=64, duplicates=duplicates, groups=8)
        exact = gradients(dense_loss, case)[1:3]  # the features'
        _take_part(case, counts)
        options: dict[str, Any] = {"transport": transport, "tile": 3, "bf16_products": True}
        ours = _whole(gradients(global_loss, case, dtype=torch.float32, **options))[1:3]
        errors[f"{name} {transport} {duplicates}"] = error(ours, exact)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
def test_captions_that_travel_rounded_stay_near(world_size: int) -> None:
    for errors in run_distributed(_in_bf16, world_size, RAGGED[world_size]):
        assert all(1e-7 < x < 2e-2 for x in errors.values()), errors


def _floats_sent(name: str, transport: str, bf16: bool) -> float:
    """Count what a rank sends in a step, in float32 numbers."""
    case = Case(name, 4 * 192, width=32)
    case.part = slice(distributed.rank() * 192, distributed.rank() * 192 + 192)
    images, texts, scale, bias = case.leaves(torch.float32)

    def step() -> None:
        loss = global_loss(
            name, images, texts, scale, bias, transport=transport, bf16_products=bf16
        ).loss
        torch.autograd.grad(loss, [images, texts])

    return bytes_sent(step) / 4


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("transport", ["gather", "ring"])
def test_only_one_side_is_sent(transport: str, bf16: bool) -> None:
    total, width = 768, 32
    # To the three other ranks: features, and gradients. The ring shows features once more in
    # backward, and brings a gradient home in a fourth turn.
    shown, home = (3 / 4, 3 / 4) if transport == "gather" else (3 / 4 + 3 / 4, 1)
    for name in NAMES:
        features = (shown / 2 if bf16 and LOSSES[name].captions_in_bf16 else shown) * total * width
        gradients = home * total * width
        for sent in run_distributed(_floats_sent, 4, name, transport, bf16):
            assert features + gradients < sent <= features + gradients + 6 * total, name
