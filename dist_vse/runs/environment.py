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
from dist_vse.common.errors import UserError
from dist_vse.common.files import sha256_of_file
from dist_vse.common.reading import BadFileError, json_lines
from dist_vse.common.version import __version__
from dist_vse.data.index import INDEX_NAME
from dist_vse.runs.files import ENVIRONMENT_NAME, VOCABULARY_NAME

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
def record_environment(
    run_dir: Path, step: int, data: dict[str, str], loss: dict[str, str] | None = None
) -> None:
    """Append a line for this attempt of the run; every rank may call it, rank 0 writes.

    `data` holds the fingerprint of each data set by its place, `loss` what computes the loss, and
    why. Raises UserError if a run that goes on after `step` began with other data or another
    vocabulary; the data may lie elsewhere now.
    """
    former = read_environment(run_dir)
    vocabulary = run_dir / VOCABULARY_NAME
    words = sha256_of_file(vocabulary)[:16] if vocabulary.is_file() else ""
    if step > 0 and former is not None:
        _check_same(run_dir, former, data, words)
    line = {"step": step, **describe_environment(), "data": data, "vocabulary": words}
    if loss is not None:
        line["loss"] = loss
    with (run_dir / ENVIRONMENT_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_environment(run_dir: Path) -> dict[str, Any] | None:
    """Return the line of the run's last start, None where it wrote none."""
    path = run_dir / ENVIRONMENT_NAME
    try:
        lines = [line for _, line in json_lines(path) if _is_whole(line)]
    except BadFileError as error:
        raise UserError(f"{path}: can't be read ({error})") from error
    return lines[-1] if lines else None


def _is_whole(line: dict[str, Any]) -> bool:
    """Return whether a line holds what we write, of the types that we write."""
    parts = [line.get(name) for name in ("versions", "machine", "data")]
    return all(
        isinstance(part, dict) and all(isinstance(v, str | int) for v in part.values())
        for part in parts
    )


def _check_same(run_dir: Path, former: dict[str, Any], data: dict[str, str], words: str) -> None:
    """Raise UserError if the data or the vocabulary are others than at the former start."""
    before, now = sorted(former["data"].values()), sorted(data.values())
    if before != now:
        raise UserError(
            f"{run_dir}: the run began with other data (fingerprints {', '.join(before)}; now "
            f"{', '.join(now)}): give the data set that it began with, or another output_dir"
        )
    if former.get("vocabulary", words) != words:
        raise UserError(
            f"{run_dir / VOCABULARY_NAME}: has changed since the run began: put the former file "
            "back, or give another output_dir"
        )


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
