"""The losses on a pretend GPU: nothing of the host meets the device, and the CPU's numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.losses import hardest, layout
from tests.support.distributed import run_distributed
from tests.support.loss_cases import NAMES, Case, global_loss
from tests.support.pretend_gpu import GpuTensor, HostMeetsDeviceError, pretend_gpu

ROWS = 24
LOSS_WAITS = 1  # of the loss alone: for the numbers that all ranks must have of each other


def _rows(ragged: bool) -> slice:
    """Return this rank's rows of the batch."""
    cut = ROWS // 2 + 5 * ragged if distributed.world_size() > 1 else ROWS
    return slice(0, cut) if distributed.rank() == 0 else slice(cut, ROWS)


def _case(name: str, duplicates: str, ragged: bool) -> Case:
    case = Case(name, ROWS, groups=10, duplicates=duplicates, weight=0.5)
    case.part = _rows(ragged)
    return case


def _found(case: Case, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    ids = case.ids_of_part()
    output = global_loss(case.name, *leaves, **ids, **case.options, tile=8, **options)
    grads = torch.autograd.grad(output.loss, leaves, allow_unused=True, materialize_grads=True)
    return [output.loss.detach(), *grads]


def _compare(name: str, duplicates: str, options: dict[str, Any], ragged: bool) -> dict[str, int]:
    """Compare with the CPU; return the waits."""
    case = _case(name, duplicates, ragged)
    right = _found(case, case.leaves(torch.float32), **options)
    with pretend_gpu() as gpu:
        leaves = [GpuTensor(x.detach()).requires_grad_() for x in case.leaves(torch.float32)]
        found = _found(case, leaves, **options)
    for ours, theirs in zip(found, right, strict=True):
        assert isinstance(ours, GpuTensor)
        if options.get("bf16_products"):  # a GPU returns float32 sums, a CPU rounds them
            torch.testing.assert_close(ours.inner, theirs, rtol=0.05, atol=0.02)
        else:
            torch.testing.assert_close(ours.inner, theirs, rtol=1e-5, atol=1e-6)
    return dict(gpu.waits)


@pytest.mark.parametrize("bf16_products", [False, True])
@pytest.mark.parametrize("duplicates", ["mask", "positive"])
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_has_the_numbers_of_the_cpu(name: str, duplicates: str, bf16_products: bool) -> None:
    waits = _compare(name, duplicates, {"bf16_products": bf16_products}, ragged=False)
    assert sum(waits.values()) <= LOSS_WAITS, waits


def _compare_all(transport: str, ragged: bool) -> list[tuple[str, dict[str, int]]]:
    options = {"transport": transport}
    return [
        (f"{name} {duplicates}", _compare(name, duplicates, options, ragged))
        for name in NAMES
        for duplicates in ("mask", "positive")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_negatives_have_the_numbers_of_the_cpu(name: str) -> None:
    case = _case(name, "positive", ragged=False)
    negatives = case.images[:7].float().flip(1)
    ids = {"negative_ids": torch.arange(7) * 5}
    right = _found(case, case.leaves(torch.float32), negatives=negatives, **ids)
    with pretend_gpu() as gpu:
        leaves = [GpuTensor(x.detach()).requires_grad_() for x in case.leaves(torch.float32)]
        found = _found(case, leaves, negatives=GpuTensor(negatives), **ids)
    for ours, theirs in zip(found, right, strict=True):
        assert isinstance(ours, GpuTensor)
        torch.testing.assert_close(ours.inner, theirs, rtol=1e-5, atol=1e-6)
    assert sum(gpu.waits.values()) <= LOSS_WAITS, gpu.waits


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("transport", ["gather", "ring"])
def test_two_ranks_have_the_numbers_of_the_cpu(transport: str, ragged: bool) -> None:
    for of_rank in run_distributed(_compare_all, 2, transport, ragged, timeout=100):
        for case, waits in of_rank:
            assert sum(waits.values()) <= LOSS_WAITS, (case, waits)


def test_a_host_tensor_among_the_devices_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "sent", lambda x, device: x)
    with pytest.raises(HostMeetsDeviceError, match="dist_vse/losses/"):
        _compare("convse", "mask", {}, ragged=False)


def test_a_size_that_is_read_back_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hardest._pairs

    def pairs(*args: Any) -> Any:
        found = real(*args)
        found.active.nonzero()
        return found

    monkeypatch.setattr(hardest, "_pairs", pairs)
    waits = _compare("vse++", "mask", {}, ragged=False)
    assert sum(waits.values()) > LOSS_WAITS
    assert any("nonzero at dist_vse/losses/hardest.py" in place for place in waits)
