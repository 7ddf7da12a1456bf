"""`python -m examples [NAME ...]`: run examples in one process and in two, and compare them."""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

NEEDS = {
    "with_ddp": (),
    "with_fsdp2": (),
    "with_accelerate": ("accelerate",),
    "with_lightning": ("lightning",),
    "with_trainer": ("transformers", "accelerate"),
    "with_sentence_transformers": ("sentence_transformers", "datasets"),
    "with_open_clip": ("open_clip", "pandas"),
}
"""The examples, and the modules that each imports; `pip install 'dist_vse[examples]'` has all."""
TOLERANCE = 1e-5  # of a weight
TIMEOUT_S = 300


def missing(name: str) -> list[str]:
    """Return the modules that an example needs and that are not installed."""
    return [module for module in NEEDS[name] if importlib.util.find_spec(module) is None]


def compare(name: str) -> float:
    """Return how far a weight of two processes is from that of one, at most."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{count}.pt" for count in (1, 2)]
        for count, file in enumerate(files, 1):
            _run(name, count, file)
        alone, together = (torch.load(file) for file in files)
    return float((together - alone).abs().max())


def _run(name: str, processes: int, out: Path) -> None:
    """Start the processes, as a launcher does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "EXAMPLE_OUT": str(out),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", f"examples.{name}"],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if not out.exists():
        raise RuntimeError(f"{name} failed in {processes} processes:\n" + "\n".join(said))


def main(names: Sequence[str]) -> int:
    """Print a line an example; return 1 if one is not exact."""
    code = 0
    for name in names or NEEDS:
        if missing(name):
            print(f"{name}: SKIPPED, not installed: {', '.join(missing(name))}", flush=True)
            continue
        error = compare(name)
        code |= error > TOLERANCE
        print(f"{name}: weights of two processes and of one differ by {error:.1e}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
