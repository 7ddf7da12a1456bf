"""Index tars where they are: img2dataset's, or any in WebDataset's layout."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from pathlib import Path

from braceexpand import braceexpand

from dist_vse.common.errors import UserError
from dist_vse.common.files import atomic_write, sha256_of_file
from dist_vse.data.index import Shard, image_id, is_remote, write_offsets
from dist_vse.data.sample_fields import OPTIONAL_FIELDS
from dist_vse.shards.build.keys import safe_keys
from dist_vse.shards.build.output_checks import check_indexable
from dist_vse.shards.build.plan import check_split
from dist_vse.shards.build.sync import Advance, ShardBuilder, sync_shards
from dist_vse.shards.error_budget import ErrorBudget
from dist_vse.shards.index.wds_reader import Sample, plain_tars, read_samples
from dist_vse.shards.json_text import dump_json
from dist_vse.shards.manifest import ShardEntry, Skipped, read_manifest, shard_files, write_manifest
from dist_vse.shards.pool import ordered_map
from dist_vse.shards.remote import local_copy
from dist_vse.shards.sample_checks import BadSampleError, check_captions, check_optional
from dist_vse.shards.sources.paths import where_instead

_STEM = re.compile(r"([^/\s|?&=]+)\.tar")
FORMAT = 1  # of the side files; a new number makes all of them again
CHANGED = "changed"  # replaces the fingerprint of a tar that must be read again


@dataclass(frozen=True, slots=True)
class IndexTask:
    """One tar to index."""

    name: str  # as the index has it: from the folder, absolute, or a URL
    split: str
    side: str
    location: str  # where it is opened
    caption_key: str | None = None  # of `read_samples`

    @property
    def units(self) -> int:
        """Count tars."""
        return 1

    @property
    def files(self) -> tuple[str, ...]:
        """Name the side files."""
        return shard_files(self.name, self.side)


def find_tars(given: Sequence[str], out: Path | None) -> tuple[list[str], Path]:
    """Return all tars that the arguments stand for, and the folder for their index.

    An argument is a tar, a folder of tars, a URL or `pipe:COMMAND`; of the first two and of URLs
    `{000..099}` and `*` (local) are expanded. What exists is a path as it stands, whatever its
    name holds. Without `out` the folder is that of the first tar.

    Raises UserError where there is none, or one that `dist-vse shard` made there.
    """
    tars: list[str] = []
    for text in given:
        tars += [text] if text.startswith("pipe:") else _expand(text)
    if out is None and is_remote(tars[0]):
        raise UserError(f"{tars[0]}: is remote; name a folder for its index with --out")
    folder = Path(tars[0]).parent if out is None else out
    check_indexable([_name(tar, folder) for tar in tars], folder)
    return tars, folder


def _expand(text: str) -> list[str]:
    found: list[str] = []
    for name in [text] if os.path.exists(text) else braceexpand(text):
        path = Path(name)
        if path.is_dir():
            found += map(os.path.abspath, plain_tars(path))
        elif path.exists():
            found.append(os.path.abspath(name))
        elif "*" in name and not is_remote(name):
            found += map(os.path.abspath, sorted(glob(name) or glob(name.replace("[", "[[]"))))
        else:
            found.append(name)
    if not found:
        hint = where_instead(Path(text), ".tar") if os.path.isdir(text) else "check the path"
        raise UserError(f"{text}: no tars here; {hint}")
    return found


def index_existing(
    tars: Sequence[str],
    folder: Path,
    *,
    split: str,
    caption_key: str | None = None,
    max_bad: ErrorBudget,
    workers: int,
    advance: Advance,
) -> list[ShardEntry]:
    """Write offsets, JSON and an index of the tars into `folder`; return the entries.

    The tars are read, never written; where one is a command, the caller has the user's consent.
    Images are not decoded. A tar that was indexed is not read
    again unless its size or time changed; a remote one counts as never changing.

    Raises UserError for a tar that cannot be read, or more bad samples than `max_bad`.
    """
    check_split(split, tars[0])
    names = [_name(tar, folder) for tar in tars]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice}: is given twice; name every tar once")
    stems = safe_keys((_STEM.findall(name) or ["tar"])[-1] for name in names)
    tasks = [
        IndexTask(name, split, f"{split}.{stem}", tar, caption_key)
        for name, stem, tar in zip(names, stems, tars, strict=True)
    ]
    return sync_shards(
        folder,
        tasks,
        ShardBuilder(index_one_tar, is_indexed),
        num_samples=None,
        max_bad=max_bad,
        workers=workers,
        advance=advance,
    )


def index_one_tar(task: IndexTask, folder: Path) -> ShardEntry:
    """Write the side files of one tar, each by one rename."""
    with local_copy(task.location, folder, allow_pipe=True) as path:  # see `index_existing`
        if not path.is_file():
            raise UserError(f"{path}: no such file; check the path")
        state = _state(task)  # before the reading: a file that changes now is noticed next time
        with path.open("rb") as file:
            samples = read_samples(path, task.location, caption_key=task.caption_key)
            rows, lines, skipped = _side_files(samples, file.fileno(), task.location)
        sha256, num_bytes = sha256_of_file(path), path.stat().st_size
    shard = Shard(task.name, len(rows), num_bytes, sha256, task.side)
    offsets, meta = folder / shard.offsets_name, folder / (shard.meta_name or "")
    with atomic_write(meta) as temporary:
        temporary.write_bytes(b"".join(lines))
    write_offsets(offsets, rows)
    return ShardEntry(
        name=task.name,
        split=task.split,
        fingerprint=state,
        num_samples=len(rows),
        num_captions=sum(len(json.loads(line)["captions"]) for line in lines),
        num_bytes=num_bytes,
        sha256=sha256,
        offsets_sha256=sha256_of_file(offsets),
        skipped=skipped,
        side=task.side,
        meta_sha256=sha256_of_file(meta),
    )


def is_indexed(task: IndexTask, folder: Path, entry: ShardEntry) -> bool:
    """Return whether the side files are whole and belong to this tar."""
    shard = Shard(entry.name, entry.num_samples, entry.num_bytes, "", entry.side)
    offsets, meta = folder / shard.offsets_name, folder / (shard.meta_name or "")
    return (
        entry.side == task.side
        and offsets.is_file()
        and meta.is_file()
        and _state(task) == entry.fingerprint
        and sha256_of_file(offsets) == entry.offsets_sha256
        and sha256_of_file(meta) == entry.meta_sha256
    )


def check_tars(folder: Path, split: str, *, workers: int, allow_pipe: bool) -> None:
    """Check that the indexed tars of a split hold the bytes that were indexed.

    One that does not is marked as changed: `index_existing` then reads it again, whatever its size
    and time. Raises UserError for one that does not, or that cannot be read.
    """
    entries = read_manifest(folder)
    indexed = [entry for entry in entries.values() if entry.side and entry.split == split]
    look = partial(_is_same, folder=folder, allow_pipe=allow_pipe)
    same = ordered_map(look, indexed, workers)
    changed = [entry.name for entry, ok in zip(indexed, same, strict=True) if not ok]
    if not changed:
        return
    for name in changed:
        entries[name] = replace(entries[name], fingerprint=CHANGED)
    write_manifest(folder, entries.values())
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    raise UserError(
        f"{changed[0]}{more}: the bytes are not those that were indexed; copy it again, or run "
        "`dist-vse shard index` to accept the new bytes"
    )


def _is_same(entry: ShardEntry, folder: Path, allow_pipe: bool) -> bool:
    location = entry.name if is_remote(entry.name) else str(folder / entry.name)
    with local_copy(location, Path(tempfile.gettempdir()), allow_pipe=allow_pipe) as path:
        if not path.is_file():
            raise UserError(f"{path}: is missing; copy it there again")
        return path.stat().st_size == entry.num_bytes and sha256_of_file(path) == entry.sha256


def _side_files(
    samples: Iterable[Sample], file: int, location: str
) -> tuple[list[tuple[int, ...]], list[bytes], list[Skipped]]:
    """Return the rows of offsets, the lines of JSON, and what was left out."""
    rows: list[tuple[int, ...]] = []
    lines: list[bytes] = []
    skipped: list[Skipped] = []
    position = 0
    for sample in samples:
        try:
            offset, num_bytes = _checked(sample)
        except BadSampleError as error:
            skipped.append(Skipped(sample.key, location, str(error)))
            continue
        content: dict[str, object] = {"key": sample.key, "captions": sample.captions}
        if sample.languages:
            content["languages"] = sample.languages
        content |= {k: v for k, v in sample.fields.items() if k in OPTIONAL_FIELDS}
        line = dump_json(content) + b"\n"
        identity = image_id(os.pread(file, num_bytes, offset))
        rows.append((offset, num_bytes, position, len(line) - 1, identity))
        lines.append(line)
        position += len(line)
    return rows, lines, skipped


def _checked(sample: Sample) -> tuple[int, int]:
    """Return where the image lies; raise BadSampleError if the sample is of no use."""
    if sample.fault or sample.image is None:
        raise BadSampleError(sample.fault)
    check_captions(sample.captions)
    check_optional(sample.fields, len(sample.captions))
    if sample.image[1] == 0:
        raise BadSampleError("the image file is empty (0 bytes)")
    return sample.image


def _name(tar: str, folder: Path) -> str:
    if is_remote(tar):
        return tar
    path, root = Path(tar).resolve(), folder.resolve()
    name = str(path.relative_to(root) if path.is_relative_to(root) else path)
    return f"./{name}" if is_remote(name) else name


def _state(task: IndexTask) -> str:
    state: list[object] = [FORMAT, task.location if is_remote(task.location) else ""]
    if task.caption_key is not None:
        state.append(task.caption_key)
    if not is_remote(task.location):
        try:
            status = os.stat(task.location)
        except OSError:
            return ""
        state += [status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
