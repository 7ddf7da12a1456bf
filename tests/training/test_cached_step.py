"""Gradient caching in loops that are not ours: wrapped by others, it equals one process."""

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dist_vse import GlobalContrastiveLoss, UserError, cached_step
from dist_vse.losses.dense_loss import dense_loss
from tests.support.distributed import run_distributed
from tests.support.toy_towers import Towers, gradients, make_pairs, make_towers, rows_of_rank

COUNTS = [12, 12]
LOSSES = ("info_nce", "convse++", "siglip")


def _wrapped(how: str, model: Towers) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard  # slow to import

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.image, model.text, model):
        fully_shard(part, mesh=mesh)
    return model


def _exact(name: str, *, scale: bool = False) -> dict[str, Tensor]:
    """Return the gradients of one process with the dense loss and plain autograd."""
    model, loss = make_towers(scale=scale), GlobalContrastiveLoss(name)
    images, texts, *logit_scale = model(**make_pairs(sum(COUNTS)))
    log_scale = logit_scale[0].log() if logit_scale else loss.log_scale
    dense_loss(name, images, texts, log_scale, loss.bias, loss.options).backward()
    return gradients(model) if scale else gradients(model, loss)


def _steps(hows: tuple[str, ...], names: tuple[str, ...]) -> dict[str, Any]:
    """Return every case's gradients, and the messages of DDP."""
    found: dict[str, Any] = {}
    pairs = make_pairs(sum(COUNTS))
    for how, name, chunk_size in itertools.product(hows, names, (4, 12)):
        model, loss = make_towers(), GlobalContrastiveLoss(name)
        outer = _wrapped(how, model)
        batch = rows_of_rank(pairs, COUNTS, dist.get_rank())
        cached_step(outer, loss, batch, chunk_size=chunk_size)
        found[f"{how} {name} {chunk_size}"] = gradients(outer, loss)
    model, loss = make_towers(), GlobalContrastiveLoss("info_nce")
    outer = _wrapped("ddp", model)
    uneven = rows_of_rank(pairs, [17, 7], dist.get_rank())  # five chunks, and two
    messages: list[int] = []

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        messages.append(bucket.buffer().numel())
        group: Any = None
        return default_hooks.allreduce_hook(group, bucket)

    outer.register_comm_hook(None, count)  # type: ignore[operator]
    value = cached_step(outer, loss, tuple(uneven.values()), chunk_size=4)
    found["uneven"] = gradients(outer, loss)
    own = make_towers(scale=True)
    outer = _wrapped("ddp", own)
    batch = rows_of_rank(pairs, COUNTS, dist.get_rank())
    cached_step(outer, GlobalContrastiveLoss("info_nce"), batch, chunk_size=4)
    found["own scale"] = gradients(outer)
    with pytest.raises(UserError, match="nothing averages the gradients of Towers over the 2"):
        cached_step(make_towers(), loss, batch, chunk_size=4)
    return {"gradients": found, "messages": messages, "value": float(value)}


@pytest.mark.parametrize(
    ("hows", "names"),
    [
        (("ddp",), ("siglip",)),
        pytest.param(("ddp", "fsdp2"), LOSSES, marks=pytest.mark.slow),
    ],
)
def test_wrapped_by_others_it_has_the_gradient_of_one_process(
    hows: tuple[str, ...], names: tuple[str, ...]
) -> None:
    first, second = run_distributed(_steps, 2, hows, names)
    assert first["value"] == second["value"]
    assert len(first["messages"]) == 1  # for five chunks here, two there
    for case, grads in first["gradients"].items():
        name = case.split()[1] if case.startswith(hows) else "info_nce"
        exact = _exact(name, scale=case == "own scale")
        assert grads.keys() == exact.keys()
        for part, grad in grads.items():
            error = (grad - exact[part]).norm() / exact[part].norm()
            assert error < 2e-6, (case, part, float(error))
            torch.testing.assert_close(grad, second["gradients"][case][part], rtol=0, atol=0)


def test_dropout_is_drawn_once_and_autocast_has_gradients() -> None:
    model, loss = make_towers(dropout=0.5), GlobalContrastiveLoss("convse")
    with torch.autocast("cpu", torch.bfloat16):
        cached_step(model, loss, make_pairs(24), chunk_size=8)
    first, second, kept, second_again, first_again = model.seen
    assert torch.equal(first, first_again) and torch.equal(second, second_again)
    assert not torch.equal(first, second) and not torch.equal(first, kept)
    assert all(grad.norm() > 0 for grad in gradients(model).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size (0) must be at least 1"),
        ({"batch": [torch.ones(3, 2), torch.ones(2, 2)]}, "(3, 2), (2, 2)) must have one number"),
        ({"forward": lambda model, chunk: chunk["images"]}, "the model returned Tensor, not two"),
    ],
)
def test_a_slip_is_one_line(changes: dict[str, Any], message: str) -> None:
    given = {"batch": make_pairs(4), "chunk_size": 2} | changes
    batch = given.pop("batch")
    with pytest.raises(UserError) as error:
        cached_step(make_towers(), GlobalContrastiveLoss("convse"), batch, **given)
    assert message in str(error.value)


def test_backward_and_sync_are_the_loops_own() -> None:
    """As a gradient scaler has it, and a wrapper that is unknown here."""
    model, loss = make_towers(), GlobalContrastiveLoss("info_nce")
    syncs: list[bool] = []

    def sync(last: bool) -> contextlib.AbstractContextManager[None]:
        syncs.append(last)
        return contextlib.nullcontext()

    cached_step(
        model,
        loss,
        make_pairs(sum(COUNTS)),
        chunk_size=8,
        backward=lambda x: (x * 64).backward(),
        sync=sync,
    )
    assert syncs == [False, False, False, False, True, True]  # three forwards, three backwards
    for name, exact in _exact("info_nce").items():
        torch.testing.assert_close(gradients(model, loss)[name] / 64, exact)


def _zero_steps() -> dict[int, dict[str, Tensor]]:
    """Return how far each parameter moves in a step of SGD with rate 1, by ZeRO's stage."""
    from dist_vse.config import EngineConfig
    from dist_vse.engine.deepspeed_start import import_deepspeed
    from dist_vse.engine.zero import zero_config

    deepspeed = import_deepspeed()
    batch = rows_of_rank(make_pairs(sum(COUNTS)), COUNTS, dist.get_rank())
    moved = {}
    for stage in (0, 1, 2, 3):
        model = make_towers(scale=True)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        config = zero_config(
            EngineConfig(zero_stage=stage), rank_batch_size=COUNTS[0], clip_norm=0.0, bucket=1 << 16
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        cached_step(engine, GlobalContrastiveLoss("info_nce"), batch, chunk_size=4)
        engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            after = {name: p.detach().clone() for name, p in model.named_parameters()}
        moved[stage] = {name: before[name] - after[name] for name in before}
    return moved


@pytest.mark.slow
def test_under_deepspeed_it_has_the_gradient_of_one_process() -> None:
    exact = _exact("info_nce", scale=True)
    for stage, moved in run_distributed(_zero_steps, 2)[0].items():
        for part, movement in moved.items():
            error = (movement - exact[part]).norm() / exact[part].norm()
            assert error < 1e-5, (stage, part, float(error))
