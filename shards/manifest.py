"""What has been made: a line of JSON a shard, so that a run can be taken up again.

`receipts.jsonl` lies beside the shards. A line is appended when its shard is whole; a torn last
line (a kill while writing) counts as none. Until a run ends, `planned.json` names all files that it
may write: those that a kill leaves without a receipt are known as ours by it.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.files import write_json, write_json_lines
from dist_vse.data.index import Shard

RECEIPTS_NAME = "receipts.jsonl"
PLANNED_NAME = "planned.json"
SKIPPED_NAME = "skipped.jsonl"


@dataclass(frozen=True)
class Skipped:
    """A bad sample that was left out."""

    key: str
    path: str
    reason: str


@dataclass(frozen=True)
class Receipt:
    """A finished shard."""

    name: str
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
    """Return the names of the files that are made for the tar `name`, as `Receipt.files`."""
    shard = Shard(name, 0, 0, "", side)
    return shard.meta_name or name, shard.offsets_name


def read_receipts(folder: Path) -> dict[str, Receipt]:
    """Return the folder's receipts by shard name; none if it has no such file."""
    path = folder / RECEIPTS_NAME
    receipts = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            fields = json.loads(line)
            skipped = [Skipped(**entry) for entry in fields.pop("skipped")]
            receipts[fields["name"]] = Receipt(**fields, skipped=skipped)
        except (ValueError, KeyError, TypeError):
            continue  # torn, or of another version: that shard is simply made again
    return receipts


def append_receipt(folder: Path, receipt: Receipt) -> None:
    """Note that a shard is whole."""
    with (folder / RECEIPTS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(receipt)) + "\n")


def write_receipts(folder: Path, receipts: Iterable[Receipt]) -> None:
    """Write all receipts, sorted by name, in place of those that are there."""
    ordered = sorted(receipts, key=lambda receipt: receipt.name)
    write_json_lines(folder / RECEIPTS_NAME, [asdict(receipt) for receipt in ordered])


def read_planned(folder: Path) -> dict[str, list[str]]:
    """Return the files that runs which have not ended may have written, by split.

    Raises UserError for a broken note.
    """
    path = folder / PLANNED_NAME
    if not path.is_file():
        return {}
    try:
        planned: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is broken ({error}); remove it and shard again") from error
    return planned


def write_planned(folder: Path, planned: dict[str, list[str]]) -> None:
    """Note what `read_planned` returns, by one rename; without any there is no such file."""
    path = folder / PLANNED_NAME
    if not planned:
        path.unlink(missing_ok=True)
        return
    write_json(path, planned, sort_keys=True)


def write_skipped(folder: Path, skipped: Iterable[Skipped]) -> None:
    """Write the skipped samples, one a line; without any there is no such file."""
    lines = [asdict(entry) for entry in sorted(skipped, key=lambda entry: entry.key)]
    if lines:
        write_json_lines(folder / SKIPPED_NAME, lines)
    else:
        (folder / SKIPPED_NAME).unlink(missing_ok=True)
