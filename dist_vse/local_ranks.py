"""Runs a function on several processes of this machine, one thread each, over gloo."""

import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from dist_vse import distributed
from dist_vse.errors import UserError


def run_on_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """Call `fn(*args)` on every rank and return what rank 0's call returned.

    A UserError, which all ranks must raise alike, is raised here.
    """
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        result = Path(folder) / "result"
        start_processes(
            _work, (world_size, port, result, fn, args), world_size, start_method="spawn"
        )
        value = pickle.loads(result.read_bytes())
    if isinstance(value, UserError):
        raise value
    return value


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
