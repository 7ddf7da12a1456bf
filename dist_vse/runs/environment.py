"""What a run was made with: versions, machine and data, written by the run itself."""

import contextlib
import hashlib
import json
import os
import platform
import socket
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.files import sha256_of_file
from dist_vse.common.log import logger
from dist_vse.common.reading import BadFileError, json_lines
from dist_vse.common.version import __version__
from dist_vse.data.index import INDEX_NAME, Index, Shard, is_remote
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
    run_dir: Path,
    step: int,
    data: dict[str, str],
    loss: dict[str, str] | None = None,
    *,
    shards: Mapping[str, str] | None = None,
    allow: Collection[str] = (),
) -> None:
    """Append a line for this attempt of the run; every rank may call it, rank 0 writes.

    `data` holds the fingerprint of each data set by its place, `shards` the state of its local
    files, `loss` what computes the loss, and why. Raises UserError if a run that goes on after
    `step` began with other data or another vocabulary, unless `allow` names it; the data may lie
    elsewhere now.
    """
    former = read_environment(run_dir)
    vocabulary = run_dir / VOCABULARY_NAME
    words = sha256_of_file(vocabulary)[:16] if vocabulary.is_file() else ""
    if step > 0 and former is not None:
        _check_same(run_dir, former, data, words, allow)
        _tell_touched(former, data, shards or {})
    line = {"step": step, **describe_environment(), "data": data, "vocabulary": words}
    line["shards"] = dict(shards or {})
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


def shards_state(index: Index) -> str:
    """Return 16 hex digits that change when the size or time of a local shard does."""
    digest = hashlib.sha256()
    for shard in _local_shards(index):
        with contextlib.suppress(OSError):  # who reads it says so
            status = (index.root / shard.path).stat()
            digest.update(f"{shard.path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def verify_shards(index: Index) -> None:
    """Compare this rank's share of the local shards with the index's checksums.

    Raises UserError, on this rank, for one that differs or can't be read.
    """
    for shard in _local_shards(index)[distributed.rank() :: distributed.world_size()]:
        path = index.root / shard.path
        try:
            same = sha256_of_file(path) == shard.sha256
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror})") from error
        if not same:
            raise UserError(
                f"{path}: the bytes are not those of the index (SHA-256); copy it again, or run "
                f"`dist-vse shard repair {index.root}`"
            )


def _local_shards(index: Index) -> list[Shard]:
    shards = [s for name in sorted(index.splits) for s in index.splits[name].shards]
    return [shard for shard in shards if not is_remote(shard.path)]


def _tell_touched(
    former: Mapping[str, Any], data: Mapping[str, str], shards: Mapping[str, str]
) -> None:
    """Warn of data sets whose local shards were touched since the last start, moved ones too."""
    noted = former.get("shards")
    noted = noted if isinstance(noted, dict) else {}
    states = {former["data"].get(place): state for place, state in noted.items()}
    for place, state in shards.items():
        if states.get(data[place], state) != state:
            logger.warning(
                "%s: shards have other sizes or times than when the run stopped; to compare their "
                "bytes with the index, set resume.verify_shards=true",
                place,
            )


def _check_same(
    run_dir: Path,
    former: dict[str, Any],
    data: dict[str, str],
    words: str,
    allow: Collection[str],
) -> None:
    """Raise UserError if the data or the vocabulary are others than at the former start."""
    before, now = sorted(former["data"].values()), sorted(data.values())
    if before != now and "data" not in allow:
        raise UserError(
            f"{run_dir}: the run began with other data (fingerprints {', '.join(before)}; now "
            f"{', '.join(now)}): give the data set that it began with, or another "
            "output_dir, or continue with resume.allow=[data]"
        )
    if former.get("vocabulary", words) != words and "vocabulary" not in allow:
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
