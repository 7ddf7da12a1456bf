"""Collectives: order and sums against torch.cat in one process."""

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.distributed import group, launcher_env
from dist_vse.distributed.group import host_group
from tests.support.distributed import run_distributed


def _rows(rank: int, width: int) -> torch.Tensor:
    return torch.arange(2.0 * width).view(2, width) + 10 * rank


def _gather_and_scatter(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    rank = distributed.rank()
    weight = torch.arange(1.0, 1 + 2 * distributed.world_size()).view(-1, 1)
    gathered = distributed.gather_rows(_rows(rank, width))
    scattered = distributed.reduce_scatter_rows((rank + 1) * weight * torch.ones_like(gathered))
    return gathered, scattered


# A rank's rows are 24 bytes or 80 kB: with gloo, many bytes go straight from rank to rank.
@pytest.mark.parametrize("width", [3, 10_000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_rows_are_gathered_in_rank_order_and_scattered_as_sums(world_size: int, width: int) -> None:
    results = run_distributed(_gather_and_scatter, world_size, width)
    whole = torch.cat([_rows(rank, width) for rank in range(world_size)])
    total = sum(range(1, world_size + 1))
    for rank, (gathered, scattered) in enumerate(results):
        assert torch.equal(gathered, whole)
        weight = torch.arange(1.0 + 2 * rank, 3.0 + 2 * rank).view(-1, 1)
        assert torch.equal(scattered, (total * weight).expand(2, width))


def _gather_ragged() -> torch.Tensor:
    counts = [3, 0, 2]
    rank = distributed.rank()
    return distributed.all_gather_rows(torch.full((counts[rank], 2), float(rank)))


def test_ragged_rows_keep_rank_order() -> None:
    expected = torch.tensor([0.0, 0, 0, 2, 2]).view(-1, 1).expand(5, 2)
    for gathered in run_distributed(_gather_ragged, 3):
        assert torch.equal(gathered, expected)


def _gather_while_working() -> bool:
    rows = [torch.full((1 << 18, 4), float(distributed.rank() + 2 * i)) for i in range(4)]
    under_way = [distributed.AsyncAllGather(x) for x in rows]  # 4 MiB each: not there at once
    return all(
        torch.equal(gathering.wait()[rank], torch.full_like(rows[i], rank + 2 * i))
        for i, gathering in reversed(list(enumerate(under_way)))
        for rank in range(distributed.world_size())
    )


def test_gatherings_under_way_are_whole_when_they_were_waited_for() -> None:
    assert run_distributed(_gather_while_working, 2) == [True, True]


def _one_rank_fails() -> str:
    try:
        with distributed.raise_on_all_ranks():
            if distributed.rank() == 1:
                raise UserError("shard x is broken")
    except UserError as error:
        return str(error)
    return "no error"


def test_a_user_error_on_one_rank_is_raised_on_all() -> None:
    assert run_distributed(_one_rank_fails, 2) == ["shard x is broken (on rank 1)"] * 2


def _hang() -> None:
    if distributed.rank() == 0:
        time.sleep(60)
    distributed.barrier()


@pytest.mark.slow
def test_a_hang_fails_within_the_limit_and_shows_where() -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match="_hang"):
        run_distributed(_hang, 2, timeout=3)
    assert time.monotonic() - started < 30


def test_an_incomplete_launcher_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UserError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        distributed.process_group(),
    ):
        pass
    assert "WORLD_SIZE" not in os.environ


def test_processes_that_nobody_told_of_each_other_are_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with (
        pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS=4, but RANK is not set"),
        distributed.process_group(),
    ):
        pass


@pytest.mark.parametrize(
    ("local_rank", "local_world_size", "enough"),
    [("0", "8", False), ("7", "8", False), ("4", None, False), ("3", "4", True), ("3", None, True)],
)
def test_a_node_with_fewer_gpus_than_processes_is_named(
    monkeypatch: pytest.MonkeyPatch, local_rank: str, local_world_size: str | None, enough: bool
) -> None:
    class _PastTheCheck(Exception):  # noqa: N818
        pass

    def set_device(_: torch.device) -> None:
        raise _PastTheCheck

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    if local_world_size is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    expected = _PastTheCheck if enough else UserError
    processes = None if enough else f"{local_world_size or 5} processes, but PyTorch sees 4 GPU"
    with pytest.raises(expected, match=processes), distributed.process_group():
        pass


def test_a_task_that_sees_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launcher_env.choose_gpu()
    assert os.environ["LOCAL_RANK"] == "0"


def test_two_ranks_of_a_node_with_one_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [("a", "GPU-1"), ("b", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1")]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # somebody puts two of one node on one GPU
    launcher_env.check_own_gpus(gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launcher_env.check_own_gpus(gpus[:3])
    with pytest.raises(UserError, match="ranks 1 and 3 have the same GPU on b"):
        launcher_env.check_own_gpus(gpus)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let this process believe that it has a GPU; return how the group was asked for."""
    asked: dict[str, Any] = {}
    real = dist.init_process_group

    def init_process_group(backend: str, **how: Any) -> None:
        asked.update(how, backend=backend)
        how.pop("device_id", None)
        real("gloo", **how)

    for name in ("RANK", "DS_ACCELERATOR", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    properties = SimpleNamespace(uuid="GPU-1")
    for owner, name, value in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "set_device", lambda _: None),
        (torch.cuda, "get_device_properties", lambda _: properties),
        (dist, "init_process_group", init_process_group),
        (torch.backends.cudnn, "allow_tf32", True),
    ):
        monkeypatch.setattr(owner, name, value)
    return asked


def test_nccl_knows_its_gpu_and_a_second_group_sends_what_lies_on_the_host(
    a_gpu: dict[str, Any],
) -> None:
    with distributed.process_group(timeout_s=20):
        assert a_gpu["backend"] == "nccl"
        assert a_gpu["device_id"] == torch.device("cuda", 0)
        messages = host_group()
        assert messages is not None and dist.get_backend(messages) == "gloo"
        assert not torch.backends.cudnn.allow_tf32  # float32 means float32
    assert host_group() is None


def _groups_used() -> list[bool]:
    """Return of each message between two ranks whether it went over the host's group."""
    messages = dist.new_group(backend="gloo")
    used: list[bool] = []

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def run(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            used.append(group is messages)
            return real(*args, group=group, **kwargs)

        return run

    names = "all_reduce", "all_gather_object", "broadcast_object_list", "barrier"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "_host_group", messages)
        for name in names:
            patch.setattr(dist, name, watched(name))
        assert distributed.any_rank_each([distributed.rank() == 1, False]) == [True, False]
        with pytest.raises(UserError, match="no"), distributed.raise_on_all_ranks():
            raise UserError("no")
        assert distributed.broadcast_object(distributed.rank()) == 0
        distributed.barrier()
    return used


def test_flags_errors_and_objects_do_not_pass_through_a_gpu() -> None:
    for used in run_distributed(_groups_used, 2):
        assert len(used) == 5 and all(used)
