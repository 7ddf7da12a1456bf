"""Verify a data set: are the bytes those of the index, and is every sample usable?"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.files import sha256_of_file
from dist_vse.data.index import Index, Shard, image_id
from dist_vse.shards.manifest import ShardEntry, read_manifest
from dist_vse.shards.pool import ordered_map
from dist_vse.shards.sample_checks import BadSampleError, check_captions, check_image
from dist_vse.shards.verify.read import Stored, local_tar, read_stored


@dataclass(frozen=True)
class Finding:
    """What was found in one shard."""

    shard: Shard
    split: str
    damage: list[str] = field(default_factory=list)  # the bytes are not those of the index
    unusable: list[str] = field(default_factory=list)  # samples, in bytes that are as they were
    num_captions: int = 0


def verify_dataset(index: Index, *, workers: int, advance: Callable[[int], None]) -> list[Finding]:
    """Check every shard of the index, in `workers` processes; `advance` is called after each.

    Raises UserError if a remote shard cannot be read.
    """
    entries = read_manifest(index.root)
    shards = [(name, shard) for name, split in index.splits.items() for shard in split.shards]
    look = partial(verify_shard, index=index, entries=entries)
    findings = []
    for finding in ordered_map(look, shards, workers):
        findings.append(finding)
        advance(1)
    return [*findings, *_wrong_counts(index, findings)]


def verify_shard(named: tuple[str, Shard], index: Index, entries: dict[str, ShardEntry]) -> Finding:
    """Compare a shard's files with the index and the manifest, and decode all of its images."""
    split, shard = named
    finding = Finding(shard, split)
    with local_tar(index, shard) as tar:
        finding.damage.extend(_file_damage(index, shard, tar, entries.get(shard.path)))
        if finding.damage:
            return finding  # the offsets may point anywhere
        captions = 0
        for row, stored in enumerate(read_stored(index, shard, tar)):
            try:
                captions += _check(stored)
            except BadSampleError as error:
                finding.unusable.append(f"sample {_name(stored, row)}: {error}")
    return Finding(shard, split, finding.damage, finding.unusable, captions)


def _file_damage(index: Index, shard: Shard, tar: Path, entry: ShardEntry | None) -> Iterable[str]:
    """Yield what is wrong with the files of a shard."""
    if not tar.is_file():
        yield "the tar is missing"
    elif tar.stat().st_size != shard.num_bytes:
        yield f"{tar.stat().st_size:,} bytes where the index says {shard.num_bytes:,}"
    elif sha256_of_file(tar) != shard.sha256:
        yield "the bytes are not those of the index (SHA-256)"
    if shard.meta_name and not (index.root / shard.meta_name).is_file():
        yield f"{shard.meta_name} is missing"
    elif (
        shard.meta_name
        and entry
        and entry.meta_sha256 != sha256_of_file(index.root / shard.meta_name)
    ):
        yield f"{shard.meta_name} has other bytes than were written"
    try:
        index.offsets(shard)
        if entry and entry.offsets_sha256 != sha256_of_file(index.root / shard.offsets_name):
            yield f"{shard.offsets_name} has other bytes than were written"
    except (UserError, ValueError, EOFError) as error:  # NumPy's for a damaged file
        yield f"{shard.offsets_name} cannot be used ({first_line(error)})"


def _check(stored: Stored) -> int:
    """Return the number of captions; raise BadSampleError if the sample cannot be used."""
    try:
        captions = stored.caption_list()
    except (ValueError, KeyError, TypeError) as error:
        raise BadSampleError(f"its JSON is broken ({first_line(error)})") from error
    check_captions(captions)
    check_image(stored.image, decode=True)
    if image_id(stored.image) != stored.image_id:
        raise BadSampleError("its image is not the one that was indexed")
    return len(captions)


def _name(stored: Stored, row: int) -> str:
    try:
        return repr(stored.key())
    except (ValueError, KeyError, TypeError):
        return f"in row {row}"


def _wrong_counts(index: Index, findings: Iterable[Finding]) -> Iterable[Finding]:
    """Yield a finding for each split of whole shards whose captions are not as many as it says."""
    findings = list(findings)
    for name, split in index.splits.items():
        of_split = [finding for finding in findings if finding.split == name]
        found = sum(finding.num_captions for finding in of_split)
        if not any(f.damage or f.unusable for f in of_split) and found != split.num_captions:
            text = f"{found:,} captions where the index says {split.num_captions:,}"
            yield Finding(of_split[0].shard, name, [text])
