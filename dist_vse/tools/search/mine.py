"""`dist-vse mine`: the hardest negatives of a split, written into a copy of its data set.

Each image's negatives are the texts of other images that a trained model finds nearest to it.
Training reads them as `data.negatives`. n images, m captions, u different captions, d embedding.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError, writing
from dist_vse.common.log import logger, setup_logging
from dist_vse.data.index import Index, is_remote
from dist_vse.data.sample_fields import NEGATIVES
from dist_vse.evaluation.evaluate import Embedded
from dist_vse.evaluation.retrieval.checks import check_finite
from dist_vse.shards.build.dataset import build_dataset
from dist_vse.shards.build.output_checks import check_local, check_output
from dist_vse.shards.build.plan import Options
from dist_vse.shards.error_budget import ErrorBudget
from dist_vse.shards.record import Record
from dist_vse.shards.sources.reshard import read_tars
from dist_vse.shards.tables import print_summary, progress_bar
from dist_vse.tools.search.embed import embed_split, open_data, open_model

TILE = 1024
TIE = 1e-12  # scores this close are equal, as in evaluation


@dataclass(frozen=True)
class Mining:
    """What is mined."""

    split: str = "train"
    top: int = 5
    """Negatives for each image, at most."""
    ignore_above: float | None = None
    """Leave out texts within this of the cosine of the image's nearest own caption, or above."""


def mine(
    location: Path,
    out: Path,
    mining: Mining,
    *,
    data: str | None = None,
    workers: int = 1,
    allow_pipe: bool = False,
) -> None:
    """Write the data set into `out`, its split with negatives; every rank of a launcher may call.

    Other splits are copied. The shards are made as `dist-vse shard reshard` makes them, each by one
    rename: the same command continues a run that was cut. Raises UserError for what is missing,
    remote or not finite.
    """
    setup_logging()
    with distributed.process_group():
        with distributed.raise_on_all_ranks():
            index = open_data(location, data, allow_pipe=allow_pipe)
            index.split(mining.split)
            _check_places(index, out)
            model = open_model(location)
        found = embed_split(model, index, mining.split)
        check_finite(found.image_features, found.text_features)
        if len({*found.keys}) < len(found.keys):
            raise UserError(
                f"{index.root}: keys of split {mining.split!r} repeat; make other ones by "
                "`dist-vse shard reshard`, and mine there"
            )
        share = found_negatives(found, mining, distributed.device(), *_share(len(found.keys)))
        shares = distributed.all_gather_object(share)
        writes = distributed.is_main_process()
    if writes:  # the other ranks need not wait
        negatives = dict(zip(found.keys, (texts for s in shares for texts in s), strict=True))
        _write(index, out, mining.split, negatives, workers)


def found_negatives(
    found: Embedded, mining: Mining, device: torch.device, start: int, stop: int
) -> list[list[str]]:
    """Return the negatives of the images [start, stop), hardest first, equal ones by lowest row.

    Exact in float64. No text is a negative of an image that it is a caption of, by the ids of
    images and captions. A caption that stands at several images counts once.
    """
    _, text_of = found.text_ids.unique(return_inverse=True)  # (m,)
    first = _first_rows(text_of)  # (u,)
    _, group = found.image_ids.unique(return_inverse=True)  # (n,): images of one file
    order = torch.argsort(first)  # different captions in the order of their first rows
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order))
    first, text_of = first[order], number[text_of]
    keys = (group[found.image_of_text] * len(first) + text_of).unique()
    own_group, own_text = keys // len(first), keys % len(first)  # sorted by group
    texts = found.text_features[first]
    answers: list[list[str]] = []
    for block in range(start, stop, TILE):
        images = torch.arange(block, min(block + TILE, stop))
        begin, end = (torch.searchsorted(own_group, group[images], right=r) for r in (False, True))
        counts = end - begin
        row = torch.repeat_interleave(torch.arange(len(images)), counts)
        # The k-th of a row's own texts, counted back from its last one.
        back = torch.arange(len(row)) - counts.cumsum(0)[row]
        column = own_text[end[row] + back]
        features = found.image_features[images].to(device)
        best = _hardest(features, texts, row.to(device), column.to(device), mining)
        answers += [[found.captions[first[j]] for j in rows if j >= 0] for rows in best.tolist()]
    return answers


def _hardest(
    images: Tensor, texts: Tensor, own_row: Tensor, own_column: Tensor, mining: Mining
) -> Tensor:
    """Return the hardest negatives (b, top) of images (b, d): rows of texts (u, d), or -1."""
    images = images.double()
    limits = images.new_full((len(images),), torch.inf)
    if mining.ignore_above is not None:
        own = (images[own_row] * texts[own_column.cpu()].to(images)).sum(1)
        nearest = images.new_full((len(images),), -torch.inf)
        nearest.scatter_reduce_(0, own_row, own, "amax")
        limits = nearest - mining.ignore_above - TIE
    scores = images.new_empty(len(images), 0)
    rows = own_row.new_empty(len(images), 0)
    for start in range(0, len(texts), TILE):
        more = images @ texts[start : start + TILE].to(images).T
        here = (own_column >= start) & (own_column < start + more.shape[1])
        more[own_row[here], own_column[here] - start] = -torch.inf
        more.masked_fill_(more > limits.unsqueeze(1), -torch.inf)
        where = torch.arange(start, start + more.shape[1], device=rows.device).expand(more.shape)
        best, order = torch.cat([scores, more], 1).sort(dim=1, descending=True, stable=True)
        scores = best[:, : mining.top]
        rows = torch.cat([rows, where], 1).gather(1, order[:, : mining.top])
    return rows.masked_fill(scores == -torch.inf, -1)


def _first_rows(groups: Tensor) -> Tensor:
    """Return the first row of each group 0 ... u - 1 of (m,)."""
    rows = torch.arange(len(groups))
    first = rows.new_full((int(groups.max()) + 1,), len(groups))
    return first.scatter_reduce_(0, groups, rows, "amin")


def _share(count: int) -> tuple[int, int]:
    """Return the images that this rank mines for: whole tiles, so that no score depends on it."""
    rank, world_size = distributed.rank(), distributed.world_size()
    tiles = -(-count // TILE)
    start, stop = (min(count, tiles * r // world_size * TILE) for r in (rank, rank + 1))
    return start, stop


def _check_places(index: Index, out: Path) -> None:
    """Raise UserError for shards that are not local files, and an `out` that can't be written."""
    check_local(out)
    for split in index.splits.values():
        for shard in split.shards:
            if is_remote(shard.path) or is_remote(str(index.root)):
                raise UserError(
                    f"{shard.path}: is remote; copy the data set here first, and give --data"
                )


def _write(
    index: Index, out: Path, split: str, negatives: Mapping[str, Sequence[str]], workers: int
) -> None:
    """Write all splits as shards; the samples of `split` get the negatives of their keys."""
    start = time.monotonic()
    records = [
        _with_negatives(record, negatives.get(record.key, ())) if record.split == split else record
        for record in read_tars(index.root)
    ]
    splits = {record.split for record in records}
    check_output(out, records, splits)
    with writing(out), progress_bar("sharding", len(records), "images") as advance:
        entries = build_dataset(
            records,
            out,
            Options(),
            max_bad=ErrorBudget("0"),
            workers=workers,
            advance=advance,
        )
    print_summary(entries, out, seconds=time.monotonic() - start)
    counts = [len(texts) for texts in negatives.values()]
    logger.info("%d negatives for %d images of %s", sum(counts), len(counts), split)


def _with_negatives(record: Record, texts: Sequence[str]) -> Record:
    """Return the record with texts added to the negatives that it has."""
    there = record.extra.get(NEGATIVES) or []
    joined = list(dict.fromkeys([*there, *texts]))
    return replace(record, extra={**record.extra, NEGATIVES: joined})
