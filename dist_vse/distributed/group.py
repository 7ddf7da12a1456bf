"""The process group: joining it, and which of its processes this one is.

Everything here also works in one process without a group.
"""

import contextlib
import datetime
import functools
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, cast

import torch
import torch.distributed as dist

from dist_vse.distributed import launcher_env, watchdog

P = ParamSpec("P")

_host_group: dist.ProcessGroup | None = None


def rank() -> int:
    """Return this process's number, 0 to W - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return W, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this is rank 0, which writes and prints."""
    return rank() == 0


def main_process_only(write: Callable[P, None]) -> Callable[P, None]:
    """Let a function that writes be called by every rank: it does nothing but on rank 0."""

    @functools.wraps(write)
    def on_main_process(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_main_process():
            write(*args, **kwargs)

    return on_main_process


def host_group() -> dist.ProcessGroup | None:
    """Return the group that sends what lies in host memory; None is the default group.

    NCCL sends only what lies on a GPU: a flag or an error would have to be copied there and back,
    and the host would wait for all that the GPU still has to do.
    """
    return _host_group


def device() -> torch.device:
    """Return the device of this process: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextlib.contextmanager
def process_group(timeout_s: float | None = None) -> Iterator[None]:
    """Join the group that the launcher describes (or a group of one), and leave it at the end.

    A rank that waits for another one longer than `timeout_s` seconds fails; the default is
    DIST_VSE_HANG_S in the environment, else half an hour. Raises UserError if the launcher's
    variables are incomplete, or promise a GPU that is not there.
    """
    global _host_group
    launcher_env.check_accelerator()
    place: dict[str, Any] = {}  # in the environment
    if "RANK" in os.environ:
        launcher_env.check_described()
    else:
        launcher_env.check_alone()
        store = dist.HashStore()  # type: ignore[attr-defined]  # needs no port
        place = {"store": store, "rank": 0, "world_size": 1}
    os.environ.setdefault("LOCAL_RANK", "0")
    on_gpu = device().type == "cuda"
    if on_gpu:
        launcher_env.choose_gpu()
        torch.cuda.set_device(device())
        # float32 means float32, in convolutions too, until engine.precision says otherwise.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        place["device_id"] = device()
    if timeout_s is None:
        timeout_s = watchdog.limit_s()
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, **place)
    try:
        if on_gpu:
            _host_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
            launcher_env.check_own_gpus(_all_gpus())
        yield
    finally:
        # Without it gloo's threads may abort the process after all work was done.
        _host_group = None
        dist.destroy_process_group()


def _all_gpus() -> list[tuple[str, str]]:
    """Return every rank's host and GPU."""
    gpu = str(torch.cuda.get_device_properties(device()).uuid)
    gpus: list[tuple[str, str]] = [("", "")] * world_size()
    dist.all_gather_object(gpus, (socket.gethostname(), gpu), group=_host_group)
    return gpus
