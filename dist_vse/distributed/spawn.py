"""Runs a function on several processes of this machine, one thread each, over gloo."""

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessContext, start_processes

from dist_vse import distributed
from dist_vse.common.errors import UserError


def run_on_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """Call `fn(*args)` on every rank and return what rank 0's call returned.

    A UserError, which all ranks must raise alike, is raised here.
    """
    return run_rank_groups([RankGroup(fn, world_size, args)])[0]


@dataclass(frozen=True)
class RankGroup:
    """A process group of its own, and what all of its ranks call."""

    fn: Callable[..., Any]
    world_size: int
    args: Sequence[Any]


def run_rank_groups(groups: Sequence[RankGroup], *, start_method: str = "spawn") -> list[Any]:
    """Run several groups at the same time; return what every group's rank 0 returned.

    `start_method` is one of multiprocessing's.

    If a process fails, all of them are ended and its error is raised. A UserError, which all
    ranks of a group must raise alike, is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(number) for number in range(len(groups))]
        running = [
            _start(group, result, start_method)
            for group, result in zip(groups, results, strict=True)
        ]
        try:
            while not all([context.join(timeout=0.1) for context in running]):
                pass
        finally:
            for process in (process for context in running for process in context.processes):
                if process.is_alive():
                    process.kill()
        values = [pickle.loads(result.read_bytes()) for result in results]
    for value in values:
        if isinstance(value, UserError):
            raise value
    return values


def _start(group: RankGroup, result: Path, start_method: str) -> ProcessContext:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (group.world_size, port, result, group.fn, group.args)
    context: ProcessContext = start_processes(
        _work, arguments, group.world_size, join=False, start_method=start_method
    )
    return context


def _work(
    rank: int, world_size: int, port: int, result: Path, fn: Callable[..., Any], args: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",  # gloo and the CPU, whatever else the machine has
    }
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_the_parent, daemon=True).start()
    with distributed.process_group():
        try:
            value = fn(*args)
        except UserError as error:
            value = error
        if distributed.is_main_process():
            result.write_bytes(pickle.dumps(value))
    # At once: while PyTorch's threads still run, its shutdown aborts the process now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _exit_with_the_parent() -> None:
    """End this process when its parent is gone.

    torch sends it SIGINT then, which a job in a shell's background ignores.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
