"""The shard manifest: one line of JSON for each finished shard, so that a run can be resumed.

`receipts.jsonl` lies beside the shards. A line is appended when its shard is whole. A cut last line
(from a kill while writing) is ignored. Until a run ends, `planned.json` names all files that it may
write. A kill may leave files without an entry; `planned.json` shows that they are ours.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.files import write_json, write_json_lines
from dist_vse.common.reading import BadFileError, is_count, is_file_name, json_lines, read_json
from dist_vse.common.terminal import without_secrets
from dist_vse.data.index import INDEX_NAME, Shard, read_index

MANIFEST_NAME = "receipts.jsonl"
PLANNED_NAME = "planned.json"
SKIPPED_NAME = "skipped.jsonl"


@dataclass(frozen=True)
class Skipped:
    """A bad sample that was left out."""

    key: str
    path: str
    reason: str


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard."""

    name: str  # of the tar, as in the index
    split: str
    fingerprint: str  # of its plan
    num_samples: int
    num_captions: int
    num_bytes: int
    sha256: str
    offsets_sha256: str
    skipped: list[Skipped] = field(default_factory=list)
    side: str = ""  # as in the index: not empty for a tar that is not ours
    meta_sha256: str = ""  # of the side file of JSON

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that were made, in the folder: a tar only where it is ours."""
        return shard_files(self.name, self.side)


def shard_files(name: str, side: str = "") -> tuple[str, ...]:
    """Return the names of the files that are made for the tar `name`, as `ShardEntry.files`."""
    shard = Shard(name, 0, 0, "", side)
    return shard.meta_name or name, shard.offsets_name


def read_manifest(folder: Path, names: Iterable[str] = ()) -> dict[str, ShardEntry]:
    """Return the folder's entries by shard name; none if it has no manifest.

    It keeps no secrets of URLs: those with them are among `names`, or else in the index.
    """
    path, whole = folder / MANIFEST_NAME, list(names)
    if not whole and (folder / INDEX_NAME).is_file():
        whole = [s.path for split in read_index(folder).splits.values() for s in split.shards]
    whole_names = {without_secrets(name): name for name in whole}
    entries = {}
    for _, fields in json_lines(path):
        try:
            skipped = [Skipped(**entry) for entry in fields.pop("skipped")]
            fields["name"] = whole_names.get(fields["name"], fields["name"])
            entry = ShardEntry(**fields, skipped=skipped)
            # Their files are written and removed.
            if _has_types(entry) and all(map(is_file_name, entry.files)):
                entries[entry.name] = entry
        except (KeyError, TypeError, AttributeError):
            continue  # cut, or from another version: that shard is made again
    return entries


def _has_types(entry: ShardEntry) -> bool:
    counts = (entry.num_samples, entry.num_captions, entry.num_bytes)
    texts = (entry.split, entry.fingerprint, entry.sha256, entry.offsets_sha256, entry.meta_sha256)
    return all(map(is_count, counts)) and all(isinstance(text, str) for text in texts)


def append_entry(folder: Path, entry: ShardEntry) -> None:
    """Record that a shard is whole."""
    with (folder / MANIFEST_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(_stored(entry)) + "\n")


def _stored(entry: ShardEntry | Skipped) -> dict[str, Any]:
    """Return what is written of an entry: URLs without their secrets."""
    fields = asdict(entry)
    for name in ("name", "path", "reason"):
        if name in fields:
            fields[name] = without_secrets(fields[name])
    if isinstance(entry, ShardEntry):
        fields["skipped"] = [_stored(skipped) for skipped in entry.skipped]
    return fields


def write_manifest(folder: Path, entries: Iterable[ShardEntry]) -> None:
    """Write all entries, sorted by name, and replace the old ones."""
    ordered = sorted(entries, key=lambda entry: entry.name)
    write_json_lines(folder / MANIFEST_NAME, [_stored(entry) for entry in ordered])


def read_planned(folder: Path) -> dict[str, list[str]]:
    """Return the files that unfinished runs may have written, by split.

    Raises UserError if the file is broken.
    """
    path = folder / PLANNED_NAME
    if not path.is_file():
        return {}
    try:
        planned: dict[str, list[str]] = read_json(path)
        for names in planned.values():  # they are removed: none may lie outside of the folder
            if not isinstance(names, list) or not all(map(is_file_name, names)):
                raise BadFileError("must hold lists of file names")
    except BadFileError as error:
        raise UserError(f"{path}: is broken ({error}); remove it and shard again") from error
    return planned


def write_planned(folder: Path, planned: dict[str, list[str]]) -> None:
    """Write what `read_planned` returns; remove the file if there is nothing to write."""
    path = folder / PLANNED_NAME
    if not planned:
        path.unlink(missing_ok=True)
        return
    write_json(path, planned, sort_keys=True)


def write_skipped(folder: Path, skipped: Iterable[Skipped]) -> None:
    """Write the skipped samples, one per line; remove the file if there are none."""
    lines = [_stored(entry) for entry in sorted(skipped, key=lambda entry: entry.key)]
    if lines:
        write_json_lines(folder / SKIPPED_NAME, lines)
    else:
        (folder / SKIPPED_NAME).unlink(missing_ok=True)
