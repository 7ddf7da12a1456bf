"""Gradients are reduced during the last backward: each once, to its owner, in one order."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.config import EngineConfig, OptimConfig
from dist_vse.distributed import AsyncReduce
from dist_vse.engine import gradient_reduction
from dist_vse.engine.gradient_reduction import GradientReduction, GradientSlice
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.zero import ZeroEngine
from tests.support.collectives import Collectives
from tests.support.distributed import run_distributed
from tests.support.pretend_gpu import GpuTensor
from tests.support.tiny import tiny_batch, tiny_model

MILLION = 1 << 20  # elements of 4 bytes


def _reduced(owner: int | None) -> Tensor:
    x = torch.full((3,), 1.0 + distributed.rank())
    AsyncReduce(x, owner).wait()
    return x


@pytest.mark.parametrize("owner", [None, 0, 2])
def test_a_reduction_gives_its_owner_the_sum(owner: int | None) -> None:
    for rank, x in enumerate(run_distributed(_reduced, 3, owner)):
        assert owner not in (None, rank) or x.tolist() == [6.0] * 3


def test_buckets_hold_every_slice_once_and_one_owner_and_type_each() -> None:
    parameters = [nn.Parameter(torch.zeros(size)) for size in (4, 30, 4, 3, 5, 12)]
    wires = [torch.bfloat16 if number == 3 else torch.float32 for number in range(6)]
    owners = [number % 2 for number in range(6)]
    slices = [
        GradientSlice(p, 0, p.numel(), o, w)
        for p, o, w in zip(parameters, owners, wires, strict=True)
    ]
    buckets = list(gradient_reduction._buckets(slices, 10))
    assert sorted(map(id, slices)) == sorted(id(s) for bucket in buckets for s in bucket)
    assert all(len({(s.owner, s.wire_dtype) for s in bucket}) == 1 for bucket in buckets)
    assert [[s.length for s in b] for b in buckets] == [[30], [4, 4, 5], [12], [3]]


def test_messages_are_larger_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sent:
        def __init__(self, message: Tensor, owner: int | None) -> None:
            sizes.append(message.numel() // MILLION)

        def wait(self) -> None:
            pass

    def messages(move: Callable[[Tensor], Tensor]) -> list[int]:
        sizes.clear()
        parameters = [nn.Parameter(move(torch.zeros(MILLION))) for _ in range(9)]
        reduction = GradientReduction(
            [GradientSlice(p, 0, MILLION, 1, p.dtype) for p in parameters]
        )
        reduction.start()
        reduction.finish()
        return sizes

    sizes: list[int] = []
    monkeypatch.setattr(gradient_reduction, "AsyncReduce", Sent)
    monkeypatch.setattr(gradient_reduction, "world_size", lambda: 2)
    assert messages(lambda x: x) == [1] * 9
    assert messages(GpuTensor) == [8, 1]  # of at most 32 MB


class _Net(nn.Module):
    """Layers one after another; `early` and `late` may change places, `seldom` may be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early, self.late, self.seldom = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, *, swapped: bool, whole: bool) -> Tensor:
        layers = [self.late, self.early] if swapped else [self.early, self.late]
        for layer in layers + [self.seldom] * whole:
            x = layer(x).tanh()
        return x.sum()


def _averages(owner: int | None) -> tuple[list[Tensor], list[Tensor], list[bool]]:
    """Return the averages, what they should be, and whether each was on its way in backward."""
    gradient_reduction.BUCKET = 6
    rank, net = distributed.rank(), _Net()
    own = {"swapped": rank == 1, "whole": rank == 0}
    x = torch.arange(8.0).view(2, 4) / (1 + rank)
    alone = []
    for step in range(2):  # the second one finds gradients there
        for p in net.parameters():
            p.grad = None
        net(x + step, **own).backward()
        alone += [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    expected = [distributed.all_reduce_mean(grad.clone()) for grad in alone[6:]]
    reduction = GradientReduction(
        [GradientSlice(p, 0, p.numel(), owner, p.dtype) for p in net.parameters()]
    )
    for step in range(2):
        for p in net.parameters():
            p.grad = None
        reduction.start()
        net(x + step, **own).backward()
        sent = [bucket._reduction is not None for bucket in reduction._buckets]
        reduction.finish()
    return [p.grad for p in net.parameters() if p.grad is not None], expected, sent


@pytest.mark.parametrize("owner", [None, 1])
def test_ranks_whose_backwards_differ_reduce_alike(owner: int | None) -> None:
    for rank, (found, expected, sent) in enumerate(run_distributed(_averages, 3, owner)):
        if owner in (None, rank):
            assert len(found) == len(expected) == 6
            assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
        # `seldom` comes first: where it is left out, nothing can be sent before the end.
        assert sent == [rank == 0] * len(sent)


def _bytes_reduced(precision: str) -> list[int]:
    """Return those of a step by DeepSpeed itself and by us."""
    totals = []
    for coalesce in (False, True):
        model = tiny_model()
        sgd = build_optimizer(model, OptimConfig(name="sgd", lr=0.1, weight_decay=0.0))
        zero = ZeroEngine(model, sgd, EngineConfig(2, precision, coalesce), rank_batch_size=4)
        images, tokens = tiny_batch(4, distributed.rank())
        outputs = zero(**model.prepare(images=images, tokens=tokens))
        with Collectives() as counted, zero.accumulation():
            zero.backward(outputs[0].sum() + outputs[1].sum() + outputs[2].sum(), last=True)
        totals.append(counted.num_bytes["reduce"] + counted.num_bytes["allreduce"])
    return totals


@pytest.mark.slow
def test_no_more_is_sent_than_deepspeed_itself_would_send() -> None:
    sent = {kind: run_distributed(_bytes_reduced, 2, kind)[0] for kind in ("fp32", "bf16")}
    assert sent["fp32"][0] == sent["fp32"][1] > 0
    assert sent["bf16"][0] == sent["bf16"][1] < sent["fp32"][0]


def test_one_process_rounds_as_several_do_and_fills_in_zeros() -> None:
    used, unused = (nn.Parameter(torch.tensor([1.0, 1 / 3])) for _ in range(2))
    slices = [GradientSlice(p, 0, 2, None, torch.bfloat16) for p in (used, unused)]
    reduction = GradientReduction(slices)
    reduction.start()
    (used * torch.tensor([1.0, 1 / 3])).sum().backward()
    reduction.finish()
    assert used.grad is not None and unused.grad is not None
    assert used.grad.tolist() == [1.0, float(torch.tensor(1 / 3).bfloat16())]
    assert unused.grad.tolist() == [0.0, 0.0]
