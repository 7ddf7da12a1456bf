"""Checkpoints: a folder that appears by one rename, whole or not at all.

`checkpoints/step-000100/` holds `model.safetensors` (whole float32 weights and buffers, frozen
towers too, readable without this package), `rank-0.safetensors` ... (each rank's share of the
optimizer's state and of averaged weights, and its random state) and `manifest.json` (step, data
position, world size, ZeRO stage, score, size and checksum of every file). No file holds code: a
stranger's checkpoint is safe to load. Any number of processes resumes from it, at any ZeRO stage
or under FSDP2.
Of a run with adapters (`model.lora`), `model.safetensors` holds all but the weights that stay.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.common.errors import UserError, first_line, writing
from dist_vse.common.files import fsync_path, sha256_of_file
from dist_vse.common.host_copy import host_copy
from dist_vse.common.log import logger
from dist_vse.common.random_state import RandomState, random_state, restore
from dist_vse.common.reading import BadFileError, is_count, is_number, read_json
from dist_vse.engine import RunEngine
from dist_vse.engine.deepspeed_internals import whole_shape
from dist_vse.engine.weight_average import take_averages
from dist_vse.models.lora import base_names

WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
DAMAGED = ".damaged"
_FULL = re.compile(r"os error (28|122|27)\b", re.IGNORECASE)  # ENOSPC, EDQUOT, EFBIG of Linux
_RANDOM_CPU, _RANDOM_CUDA = "random/cpu", "random/cuda"


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int
    samples_seen: int
    streams: list[list[int]]  # (L, 2): epoch and position of every stream


Tensors = dict[str, Tensor]
Fit = Callable[[Tensors, nn.Module], Tensors]
FileDigests = dict[str, dict[str, Any]]
"""Size and checksum of files, by their names."""


def snapshot(engine: RunEngine) -> dict[str, Tensors]:
    """Copy what this rank saves to host memory: file names with their tensors.

    Every rank calls this. The copies stay as they are while training goes on.
    """
    random = random_state()
    own = engine.dump_optimizer() | {_RANDOM_CPU: random.cpu.clone()}
    if random.cuda is not None:
        own[_RANDOM_CUDA] = random.cuda.clone()
    files = {_rank_file(distributed.rank()): own}
    with engine.gathered_parameters() as model:
        if distributed.is_main_process():
            files[WEIGHTS] = _whole_weights(model)
    return files


def write_files(folder: Path, files: Mapping[str, Tensors]) -> FileDigests:
    """Write files that hold after a power cut; return their digests. Raises OSError."""
    if folder.is_symlink():  # planted by somebody else who may write here
        folder.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, tensors in files.items():
        path = folder / name
        try:
            save_file(tensors, path)
        except SafetensorError as error:  # it wraps the system's error
            code = errno.ENOSPC if _FULL.search(str(error)) else errno.EIO
            raise OSError(code, first_line(error)) from error
        fsync_path(path)
        digests[name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    return digests


def write_manifest(temporary: Path, progress: Progress, digests: FileDigests, **more: Any) -> None:
    """Write the manifest beside all ranks' files. Raises OSError."""
    description = {**asdict(progress), **more, "files": digests}
    description["checksum"] = _checksum(description)
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps(description, indent=1), encoding="utf-8")
    fsync_path(manifest)
    fsync_path(temporary)


def publish(temporary: Path, final: Path) -> None:
    """Turn a sealed folder into a checkpoint, in one rename. Raises OSError."""
    if final.exists():  # an earlier attempt's, which appeared after this one had begun
        _remove(final)
    os.rename(temporary, final)
    fsync_path(final.parent)


def prune(folder: Path, *, keep_last: int, keep_best: int) -> None:
    """Remove all checkpoints but the newest ones and those of the highest scores."""
    paths = steps(folder)
    kept = set(paths[-keep_last:])
    if keep_best:
        scores = {path: score for path in paths if (score := _score(path)) is not None}
        kept |= set(sorted(scores, key=scores.__getitem__)[-keep_best:])
    for path in paths:
        if path not in kept:
            _remove(path)


def _score(path: Path) -> float | None:
    """Return a checkpoint's score; None if it has none, or no manifest that can be read."""
    try:
        score: float | None = read_manifest(path).get("score")
    except BadFileError:
        return None
    return score


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves none that is half there."""
    removed = path.with_name(path.name + TEMPORARY)
    os.rename(path, removed)
    shutil.rmtree(removed, ignore_errors=True)  # the next start removes what a reader holds open


def load_latest(folder: Path, engine: RunEngine) -> Progress | None:
    """Load the newest whole checkpoint into a fresh engine; return None if there is none.

    Every rank calls this, and all load the same one; it may come from another number of
    processes, and another ZeRO stage or engine. Damaged ones that are newer are set aside. Raises
    UserError if there are checkpoints and none is whole, or if it doesn't fit the model.
    """
    path = None
    with distributed.raise_on_all_ranks(), writing(folder):
        if distributed.is_main_process():
            path = _set_damaged_aside(folder)
    path = distributed.broadcast_object(path)
    if path is None:
        return None
    manifest = read_manifest(path)
    world_size, stage = manifest["world_size"], manifest["zero_stage"]
    if world_size == 0:
        raise UserError(
            f"{path}: holds weights alone, without an optimizer's state; start a run from it by "
            "model.from_run"
        )
    with distributed.raise_on_all_ranks():
        engine.load(_read_weights(path, engine.module), rank_files(path, world_size))
    if (world_size, stage) != (distributed.world_size(), engine.stage):
        logger.info(
            "%s was written by %d processes with ZeRO %d; now %d with ZeRO %d",
            *(path, world_size, stage, distributed.world_size(), engine.stage),
        )
    if world_size == distributed.world_size():
        with distributed.raise_on_all_ranks():
            _restore_random(path / _rank_file(distributed.rank()))
    else:  # no rank's state fits: draw other numbers than those drawn at the start
        torch.manual_seed(torch.initial_seed() + 7919 * manifest["step"])
    return Progress(manifest["step"], manifest["samples_seen"], manifest["streams"])


def _restore_random(path: Path) -> None:
    """Go on with the random numbers that a rank saved. Raises UserError if these are none."""
    own = load_file(path)
    try:
        restore(RandomState(own[_RANDOM_CPU], own.get(_RANDOM_CUDA)))
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path}: holds no random state of ours ({first_line(error)}); remove this checkpoint "
            "to continue from an older one"
        ) from error


def _set_damaged_aside(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, after it is the newest of all.

    Damaged ones keep their files under another name: they would count among those to be kept.
    """
    path, paths = latest(folder), steps(folder)
    if path is None and paths:
        raise UserError(
            f"{folder}: none of the {len(paths)} checkpoints is whole ({paths[-1].name}: "
            f"{find_fault(paths[-1])}); remove them to train from the start, or give another "
            "output_dir"
        )
    for damaged in paths[paths.index(path) + 1 :] if path else []:
        aside = damaged.with_name(damaged.name + DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)  # of the same step, damaged before
        os.rename(damaged, aside)
        logger.warning("%s: renamed to %s", damaged, aside.name)
    return path


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files all have their noted checksums."""
    for path in reversed(steps(folder)):
        fault = find_fault(path)
        if fault is None:
            return path
        logger.warning("%s: skipped, %s", path, fault)
    return None


def find_fault(path: Path) -> str | None:
    """Say what is wrong with a checkpoint's files; None if they are as they were written."""
    try:
        digests = read_manifest(path)["files"]
    except BadFileError as error:
        return f"{MANIFEST} is missing or damaged ({error})"
    for name, digest in digests.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != digest["bytes"]:
            return f"{name} is cut"
        if sha256_of_file(file) != digest["sha256"]:
            return f"{name} has changed since it was written"
    return None


def check_whole(path: Path) -> None:
    """Raise UserError unless a checkpoint that the user names is as it was written."""
    if (fault := find_fault(path)) is not None:
        raise UserError(f"{path}: {fault}; name another checkpoint")


def load_weights(path: Path, model: nn.Module, *, fit: Fit | None = None) -> None:
    """Load the whole weights of a checkpoint's folder into a model, after `fit` has changed them.

    Of a run that averages its weights, the averages. Raises UserError if they don't fit. Whether
    the files are as they were written, `latest` and `check_whole` find out.
    """
    # All that a checkpoint holds was found there; adapters leave the rest as it is.
    model.load_state_dict(_read_weights(path, model, fit, averaged=True), strict=False)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself.

    Raises BadFileError unless it is as it was written: every bit of it decides how a run goes on.
    """
    manifest = read_json(path / MANIFEST)
    if manifest.pop("checksum", None) != _checksum(manifest):
        raise BadFileError("its own checksum is another")
    counts = [manifest.get(name) for name in ("step", "samples_seen", "world_size", "zero_stage")]
    streams, files, score = (manifest.get(name) for name in ("streams", "files", "score"))
    if not all(is_count(count) for count in counts):
        raise BadFileError("step, samples_seen, world_size and zero_stage must be numbers")
    if not isinstance(streams, list) or not all(_is_place(place) for place in streams):
        raise BadFileError("streams must be pairs of numbers")
    if not isinstance(files, dict) or not all(map(_is_receipt, files, files.values())):
        raise BadFileError("files must have sizes and checksums")
    ranks = range(min(manifest["world_size"], len(files)))
    if missing := {WEIGHTS, *map(_rank_file, ranks)} - files.keys():
        raise BadFileError(f"names no {min(missing)}")
    if score is not None and not is_number(score):
        raise BadFileError("score must be a number")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content without its checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_place(place: object) -> bool:
    """Return whether these are an epoch, which multiplies a number of samples, and a position."""
    right = isinstance(place, list) and len(place) == 2 and all(is_count(n) for n in place)
    return right and cast(list[int], place)[0] < 1 << 32


def _is_receipt(name: str, digest: object) -> bool:
    """Return whether a file's entry is typed, and its name stays inside the folder."""
    return (
        Path(name).name == name
        and isinstance(digest, dict)
        and is_count(digest.get("bytes"))
        and isinstance(digest.get("sha256"), str)
    )


def rank_files(path: Path, world_size: int) -> Sequence[Path]:
    """Return the files of all ranks that wrote a checkpoint."""
    return [path / _rank_file(rank) for rank in range(world_size)]


def steps(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _read_weights(
    path: Path, model: nn.Module, fit: Fit | None = None, *, averaged: bool = False
) -> Tensors:
    try:
        weights = load_file(path / WEIGHTS)
        if averaged:
            weights = take_averages(weights, sorted(path.glob("rank-*.safetensors")))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path / WEIGHTS}: can't be read ({first_line(error)})") from error
    weights = fit(weights, model) if fit is not None else weights
    _check_base(path, model)
    check_fit(weights, model, path / WEIGHTS)
    return weights


def check_fit(weights: Tensors, model: nn.Module, place: Path) -> None:
    """Raise UserError unless these are the names and shapes of what a checkpoint holds."""
    wanted = {name: whole_shape(value) for name, value in _named(model)}
    for name in sorted(wanted.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else "nothing"
        expected = tuple(wanted[name]) if name in wanted else "nothing"
        if found != expected:
            raise UserError(
                f"{place}: doesn't fit the run's config ({name} is {found}, the model has "
                f"{expected})"
            )


def _check_base(path: Path, model: nn.Module) -> None:
    """Raise UserError for adapters that were trained on other weights than the model's."""
    digest = getattr(model, "base_digest", None)
    if digest is None:
        return
    try:
        trained_on = read_manifest(path).get("base")
    except BadFileError as error:
        raise UserError(f"{path / MANIFEST}: is missing or damaged ({error})") from error
    if trained_on != digest:
        raise UserError(
            f"{path}: its adapters (model.lora) were trained on other weights than those that "
            "model.pretrained, model.from_run or the trunks' weights name now; bring those back"
        )


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers that a checkpoint holds; ZeRO 3's stay split."""
    left_out = base_names(model)
    return [(k, v) for k, v in model.state_dict(keep_vars=True).items() if k not in left_out]


def _whole_weights(module: nn.Module) -> Tensors:
    # Cloned: safetensors refuses tensors that share memory, as tied weights do.
    return {name: host_copy(v) for name, v in _named(module)}


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.safetensors"
