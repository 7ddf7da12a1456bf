"""What a run was made with: versions, machine and data, written by the run itself."""

import json
import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dist_vse import distributed
from dist_vse.common.version import __version__
from dist_vse.data.index import INDEX_NAME
from dist_vse.runs.files import ENVIRONMENT_NAME

PACKAGES = ("torch", "deepspeed", "accelerate", "webdataset", "timm", "transformers", "numpy")


def describe_environment() -> dict[str, dict[str, Any]]:
    """Return the versions and the machine of this process."""
    here = distributed.device()
    name = torch.cuda.get_device_name(here) if here.type == "cuda" else platform.processor()
    return {
        "versions": {"dist_vse": __version__, "Python": platform.python_version(), **_versions()},
        "machine": {
            "host": socket.gethostname(),
            "system": platform.platform(),
            "device": name or here.type,
            "cores": os.cpu_count(),
            "processes": distributed.world_size(),
        },
    }


@distributed.main_process_only
def record_environment(run_dir: Path, step: int, data: dict[str, str]) -> None:
    """Append a line for this attempt of the run; every rank may call it, rank 0 writes.

    `data` holds the fingerprint of each data set by its place.
    """
    line = {"step": step, **describe_environment(), "data": data}
    with (run_dir / ENVIRONMENT_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_environment(run_dir: Path) -> dict[str, Any] | None:
    """Return the line of the run's last start, None where it wrote none."""
    path = run_dir / ENVIRONMENT_NAME
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return found


def trained_on(environment: dict[str, Any] | None, location: str) -> str:
    """Return the fingerprint that the data set at `location` had; empty where none was noted."""
    if environment is None:
        return ""
    path = Path(location)
    root = path.parent if path.name == INDEX_NAME else path
    return str(environment["data"].get(str(root), ""))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # such as a torch that was built from source
            found[name] = "unknown"
    return found
