"""Processes of a check: started on this machine's devices, watched, and ended in time."""

import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """The devices of this machine, and how many ranks share them."""

    gpus: int
    """0: all runs on the CPU."""
    ranks: int

    def environment(self, rank: int, world_size: int) -> dict[str, str]:
        """Return what a rank's process needs to know of its device."""
        if not self.gpus:
            return {"DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        place = {"DS_ACCELERATOR": "cuda", "TRITON_INTERPRET": "0"}
        if world_size <= self.gpus:
            return place
        # Several ranks on a GPU: NCCL takes ranks with host names of their own for other machines.
        return place | {
            "LOCAL_RANK": str(rank % self.gpus),
            "LOCAL_WORLD_SIZE": "1",
            "NCCL_HOSTID": f"pretended-host-{rank}",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_IB_DISABLE": "1",
            "NCCL_NET": "Socket",  # and no plug-in of a cloud's
            "NCCL_MULTI_RANK_GPU_ENABLE": "1",
        }


@dataclass(frozen=True)
class Ended:
    """How a rank's process ended."""

    code: int | None
    """None: it was ended at the limit."""
    seconds: float
    log: str


def run_ranks(
    arguments: Sequence[str],
    world_size: int | None,
    place: Place,
    folder: Path,
    *,
    limit_s: float,
    grace_s: float = math.inf,
    extra: Mapping[str, str] | None = None,
) -> list[Ended]:
    """Run `python ARGUMENTS` on so many ranks (None: one process without a group).

    What runs after `limit_s` seconds is killed, with all that it has started; after the first
    failure the others have `grace_s`.
    """
    processes, began = [], time.monotonic()
    ends: queue.Queue[tuple[int, int, float]] = queue.Queue()
    logs = [folder / f"rank{rank}.log" for rank in range(world_size or 1)]
    environment = os.environ | _group(world_size) | dict(extra or {})
    ended: dict[int, tuple[int | None, float]] = {}
    deadline = began + limit_s
    try:
        for rank, log in enumerate(logs):
            own = place.environment(rank, world_size or 1)
            if world_size is not None:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | own
            with log.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, *arguments],
                    env=environment | own,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            processes.append(process)
            threading.Thread(target=_await, args=(rank, process, began, ends), daemon=True).start()
        while len(ended) < len(processes):
            rank, failed, at = ends.get(timeout=max(0.0, deadline - time.monotonic()))
            ended[rank] = failed, at
            if failed:
                deadline = min(deadline, time.monotonic() + grace_s)
    except queue.Empty:
        pass
    finally:
        for process in processes:
            _kill(process)
    whole = time.monotonic() - began
    found = []
    for rank, log in enumerate(logs):
        code, seconds = ended.get(rank, (None, whole))
        found.append(Ended(code, seconds, log.read_text(errors="replace")))
    return found


def _group(world_size: int | None) -> dict[str, str]:
    if world_size is None:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _await(
    rank: int,
    process: "subprocess.Popen[bytes]",
    began: float,
    ends: "queue.Queue[tuple[int, int, float]]",
) -> None:
    code = process.wait()
    ends.put((rank, code, time.monotonic() - began))


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it has started, such as workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all have ended
        return
    process.wait()
