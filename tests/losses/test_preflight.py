"""Arguments that do not fit, or differ between ranks: the same verdict on every rank, no hang."""

import itertools
from typing import Any

import pytest
import torch

from dist_vse import distributed
from dist_vse.common.errors import UserError
from tests.support.distributed import run_distributed
from tests.support.loss_cases import NAMES, global_loss, step_loss


def _verdicts(odd: int) -> dict[str, str]:
    """Return what a rank is told where the rank `odd` passes something else than the others."""
    x, zero, ten = torch.eye(4)[:3], torch.zeros(1), torch.full((1,), 10.0).log()
    ids, leaf = torch.arange(3), x.clone().requires_grad_()
    same: dict[str, Any] = {"args": ("convse", x, x, ten, zero), "hard_negative_weight": 1.0}
    others: dict[str, dict[str, Any]] = {
        "name": {"args": ("convs", x, x, ten, zero)},
        "rows": {"args": ("convse", x, x[:2], ten, zero)},
        "ids": {"image_ids": ids.int()},
        "loss": {"args": ("info_nce", x, x, ten, zero)},
        "embedding": {"args": ("convse", x[:, :2], x[:, :2], ten, zero)},
        "precision": {"args": ("convse", x.double(), x.double(), ten, zero)},
        "temperature": {"args": ("convse", x, x, ten + 1e-3, zero)},
        "bias": {"args": ("convse", x, x, ten, zero - 1)},
        "gradient": {"args": ("convse", leaf, x, ten, zero)},
        "duplicates": {"image_ids": ids},
        "other ids": {"text_ids": ids},
        "integers": {"args": ("convse", x.long(), x, ten, zero)},
        "tile": {"tile": 0},
        "budget": {"memory_gib": -1.0},
        "schedule": {"temperature": 0.0},
        "weight": {"hard_negative_weight": 0.5},
        "transport": {"transport": "ring"},
        "prefetched": {"prefetched": 3},
        "prefetched rows": {"prefetched": 2},
    }
    told = {}
    for what, other in others.items():
        given = same | other if distributed.rank() == odd else dict(same)
        if what == "other ids" and distributed.rank() != odd:
            given["image_ids"] = ids
        name, *tensors = given.pop("args")
        prefetched = given.pop("prefetched", 0)
        if "prefetched" in what:  # a ring sends nothing ahead: no rank waits for another here
            given["transport"] = "ring"
        loss = step_loss(name, **given)
        try:
            if prefetched:
                loss.prefetch(x[:prefetched])
            loss(*tensors)
            told[what] = "nothing"
        except UserError as error:
            told[what] = str(error)
    # What went wrong leaves nothing behind: the next step is a sound one.
    assert torch.isfinite(global_loss(*same["args"]).loss)
    return told


def test_every_rank_is_told_what_one_of_them_passes_that_does_not_fit() -> None:
    first, *others = run_distributed(_verdicts, 3, 1)
    assert others == [first, first]
    expected = {
        "name": "loss='convs' is unknown; did you mean 'convse'? (on rank 1)",
        "rows": "image_features (3, 4) and text_features (2, 4) must have one shape "
        "(rows, embedding) (on rank 1)",
        "ids": "ids (torch.int32 (3,)) must be int64, one a row (3 rows) (on rank 1)",
        "loss": "name is convse on rank 0 and info_nce on rank 1",
        "embedding": "embedding is 4 on rank 0 and 2 on rank 1",
        "precision": "precision is torch.float32 on rank 0 and torch.float64 on rank 1",
        "temperature": "log_scale is 2.30",
        "bias": "bias is 0.0 on rank 0 and -1.0 on rank 1",
        "gradient": "gradient is False on rank 0 and True on rank 1",
        "duplicates": "ids is none on rank 0 and image on rank 1",
        "other ids": "ids is image on rank 0 and text on rank 1",
        "integers": "image_features (torch.int64) and text_features (torch.float32) must be of a "
        "floating type (on rank 1)",
        "tile": "tile (0) must be a number from 1 on, or None (on rank 1)",
        "budget": "memory_gib (-1.0) must be at least 0 (on rank 1)",
        "schedule": "temperature (0.0) must be above 0 (on rank 1)",
        "weight": "hard_negative_weight is 1.0 on rank 0 and 0.5 on rank 1; pass the same "
        "on all ranks",
        "transport": "transport is gather on rank 0 and ring on rank 1",
        "prefetched": "prefetched is False on rank 0 and True on rank 1",
        "prefetched rows": "2 rows were prefetched, but the loss is given 3 (on rank 1)",
    }
    for what, text in expected.items():
        assert text in first[what], what


def _second_derivatives() -> set[str]:
    """Return what is said to each loss, transport and way to ask for a second derivative."""
    told = set()
    x, zero, ten = torch.eye(4), torch.zeros(1), torch.full((1,), 10.0).log()
    for name, transport, learned in itertools.product(NAMES, ("gather", "ring"), (False, True)):
        leaves = [x.clone().requires_grad_(), ten.clone().requires_grad_(learned)]
        loss = global_loss(name, leaves[0], x, leaves[1], zero, transport=transport).loss
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        try:
            torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
            told.add(f"{name}: nothing")
        except UserError as error:
            told.add(str(error))
    return told


def test_a_second_derivative_is_refused_for_all_losses() -> None:
    for told in run_distributed(_second_derivatives, 2):
        (only,) = told
        assert "has no second derivative; take its gradient without create_graph=True" in only


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_fault_of_all_ranks_is_told_without_a_rank(world_size: int) -> None:
    for told in run_distributed(_all_wrong, world_size):
        assert told == (
            "hard_negative_weight (2.0) must be between 0 (all violations) and 1 (the hardest)"
        )


def _all_wrong() -> str:
    x, zero = torch.eye(4), torch.zeros(1)
    with pytest.raises(UserError) as error:
        global_loss("convse++", x, x, zero, zero, hard_negative_weight=2.0)
    return str(error.value)
