"""Run a function on several ranks: real processes, real gloo, a hard time limit."""

import contextlib
import faulthandler
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60
) -> list[Any]:
    """Call `fn(*args)` on every rank and return the results, in rank order.

    A rank that fails, or a hang of more than `timeout` seconds, fails with every rank's
    traceback. `fn` must be importable (a function of a test module), its result picklable.
    """
    with tempfile.TemporaryDirectory() as tmp:
        try:
            mp.start_processes(
                _worker, (fn, world_size, tmp, args, timeout), world_size, start_method="forkserver"
            )
        except Exception as error:
            logs = sorted(Path(tmp).glob("*.log"))
            ranks = "\n".join(f"--- {log.stem} ---\n{log.read_text()}" for log in logs)
            name = getattr(fn, "__name__", str(fn))
            message = f"{name} failed on {world_size} ranks: {error}\n{ranks}"
            raise AssertionError(message) from None
        return [
            torch.load(f"{tmp}/rank{rank}.pt", weights_only=False) for rank in range(world_size)
        ]


def _worker(
    rank: int, fn: Callable[..., Any], world_size: int, tmp: str, args: Any, timeout: float
) -> None:
    with open(f"{tmp}/rank{rank}.log", "w") as log:
        # A hang ends here, and the log shows where every rank stood.
        faulthandler.dump_traceback_later(timeout, exit=True, file=log)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        torch.set_num_threads(1)
        torch.manual_seed(0)
        store = f"file://{tmp}/store"  # a file, not a port: no race for a port
        dist.init_process_group("gloo", store, timedelta(seconds=timeout), world_size, rank)
        try:
            torch.save(fn(*args), f"{tmp}/rank{rank}.pt")
        except Exception:
            traceback.print_exc(file=log)
            log.flush()
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(Exception):  # the first error is the one to show
                dist.destroy_process_group()
