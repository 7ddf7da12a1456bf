"""Peak memory of a loss: what the process holds at most, and what of it is not features."""

import ctypes
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.support.open_clip_loss import peer_loss
from dist_vse import distributed
from dist_vse.distributed.spawn import run_on_ranks
from dist_vse.losses.global_loss import global_loss
from dist_vse.losses.options import LossOptions
from dist_vse.tools.verify.peer import peer_version

TRACED = 65_536  # up to this batch every allocation is traced; beyond it takes too long
PEER_BYTES = 24  # a similarity, over both of OpenCLIP's matrices, their softmax and gradients
WARM_UP = 64


def measure_memory(name: str, total: int, width: int, processes: int) -> dict[str, Any] | None:
    """Return a rank's peak in a global batch of `total`; None if the peer cannot run it here.

    `own_bytes` leaves out arrays of the features' own sizes, (b, d) and (N, d): features, and
    gradients of features. (No array of ours may happen to be as large: let `width` be a multiple
    of 5, as the sides of tiles are not.)
    """
    rows = total // processes
    if name == "OpenCLIP":
        available = status_bytes("/proc/meminfo", "MemAvailable")
        if peer_version() is None or processes * rows * total * PEER_BYTES > 0.8 * available:
            return None
    peak, seconds = run_on_ranks(_resident, processes, name, rows, width)
    own = None
    if name != "OpenCLIP" and total <= TRACED:
        own = run_on_ranks(_allocated, processes, name, rows, width)
    return {
        "loss": name,
        "global_batch": total,
        "embedding": width,
        "peak_bytes": peak,
        "own_bytes": own,
        "seconds": seconds,
    }


def _resident(name: str, rows: int, width: int) -> tuple[int, float]:
    """Return by how much the resident memory of this process rises at most, and the seconds."""
    features = _make_features(rows, width)
    _step(name, [x[:WARM_UP] for x in features])
    distributed.barrier()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status_bytes("/proc/self/status", "VmHWM")  # which is now what is resident
    started = time.perf_counter()
    _step(name, features)
    return status_bytes("/proc/self/status", "VmHWM") - before, time.perf_counter() - started


def _allocated(name: str, rows: int, width: int) -> int:
    """Return the peak of the bytes in arrays of other sizes than features'."""
    features = _make_features(rows, width)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        _step(name, features)
    feature_sizes = {rows * width * 4, rows * distributed.world_size() * width * 4}
    events = traced.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        if abs(change) not in feature_sizes:
            held += change
            peak = max(peak, held)
    return peak


def _step(name: str, features: list[torch.Tensor]) -> None:
    peer = peer_loss() if name == "OpenCLIP" else None
    if peer is not None:
        loss = peer(*features, 10.0)
    else:
        ten, zero = torch.full((1,), 10.0).log(), torch.zeros(1)
        loss = global_loss(
            name, features[0], features[1], ten, zero, LossOptions(memory_gib=0)
        ).loss
    torch.autograd.grad(loss, features)


def _make_features(rows: int, width: int) -> list[torch.Tensor]:
    made = torch.nn.functional.normalize(torch.randn(2, rows, width), dim=2)
    return [x.clone().requires_grad_() for x in made]


def status_bytes(path: str, key: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
