"""What the ranks exchange before a loss starts: one small gather.

That every rank's arguments fit, and are alike; how many rows each has, and how long features are.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.losses.layout import Layout
from dist_vse.losses.positives import OwnPairs

NUMBERS = 9  # a rank's; a first one below 0 (it is the number of rows) says that it refuses
UNIT = 0.01  # features of unit length are off by less, rounded to bfloat16 too
CLOSE = 1e-6  # the temperature's logarithm and the bias are alike if they differ by less


@dataclass(frozen=True)
class Metadata:
    """What all ranks must know of each other's features."""

    layout: Layout
    largest: float  # no |similarity| of the batch is larger
    smallest_own: float
    negatives: Layout
    """How many negatives each rank has."""


@dataclass(frozen=True)
class ArgumentSummary:
    """What a rank tells the others of its arguments to a loss."""

    numbers: Tensor  # (NUMBERS,) float64
    settings: Mapping[str, object]  # and scalars, alike on all ranks


def summarize_arguments(
    own: OwnPairs,
    num_negatives: int,
    log_scale: Tensor,
    bias: Tensor,
    settings: Mapping[str, object],
    *,
    off_unit: Tensor | None = None,
) -> ArgumentSummary:
    """Sum up what the other ranks must know; log_scale and bias are (1,).

    `off_unit` () is by how much the length of this rank's features may differ from 1, if that
    matters.
    """
    infinity = own.similarities.new_full((1,), float("inf"))
    here = [
        torch.full_like(own.longest_row, len(own.similarities)),
        torch.full_like(own.longest_row, num_negatives),
        own.longest_row,
        own.longest_column,
        torch.cat([own.similarities, infinity]).amin(),
        log_scale.detach().view(()),
        bias.detach().view(()),
        own.longest_row.new_zeros(()) if off_unit is None else off_unit,
    ]
    numbers = torch.stack([x.double() for x in here])
    code = zlib.crc32(repr(settings).encode())
    scalars = {"log_scale": log_scale.detach(), "bias": bias.detach()}
    return ArgumentSummary(
        torch.cat([numbers, numbers.new_full((1,), code)]), {**settings, **scalars}
    )


def exchange_metadata(summaries: Sequence[ArgumentSummary]) -> list[Metadata]:
    """Exchange the summaries of one or several losses, in one message.

    The host waits for the device here. Raises UserError, the same on every rank, where a rank
    refused its arguments, where the scalars or the settings differ between ranks, or for features
    of no unit length.
    """
    there = _exchange(torch.cat([each.numbers for each in summaries])).tolist()  # (W, numbers)
    if min(row[0] for row in there) < 0:
        raise distributed.first_failure(distributed.all_gather_object(None))
    starts = range(0, len(summaries) * NUMBERS, NUMBERS)
    return [
        _read([row[start : start + NUMBERS] for row in there], each)
        for start, each in zip(starts, summaries, strict=True)
    ]


def _read(there: list[list[float]], here: ArgumentSummary) -> Metadata:
    """Return what all ranks' numbers (W, NUMBERS) of a loss say."""
    columns = zip(*there, strict=True)
    counts, negatives, row_norms, column_norms, smallest, log_scales, biases, off, codes = columns
    if len(set(codes)) > 1 or _spread(log_scales) > CLOSE or _spread(biases) > CLOSE:
        settings = {k: float(v) if isinstance(v, Tensor) else v for k, v in here.settings.items()}
        raise UserError(_difference(distributed.all_gather_object(settings)))
    if max(off) > UNIT:
        raise UserError(
            f"the features must be of unit length; on rank {off.index(max(off))} one's length is "
            f"off by {max(off):.3g}: use torch.nn.functional.normalize(features, dim=1)"
        )
    layout, of_negatives = (
        Layout(tuple(int(count) for count in each), distributed.rank())
        for each in (counts, negatives)
    )
    return Metadata(layout, max(row_norms) * max(column_norms), min(smallest), of_negatives)


def refuse(fault: str, device: torch.device, *, losses: int) -> NoReturn:
    """Raise UserError for this rank's `fault`, here and on the ranks in `exchange_metadata`.

    The other ranks exchange summaries of so many losses, from features on such a device.
    """
    _exchange(torch.full((losses * NUMBERS,), -1.0, dtype=torch.float64, device=device))
    raise distributed.first_failure(distributed.all_gather_object(UserError(fault)))


def off_unit(images: Tensor, texts: Tensor) -> Tensor:
    """Return by how much a feature's length differs from 1, at most; 0 without rows."""
    norms = torch.cat([torch.linalg.vector_norm(x, dim=1) for x in (images, texts)])
    return torch.cat([norms - 1, norms.new_zeros(1)]).abs().amax()


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _exchange(numbers: Tensor) -> Tensor:
    return distributed.gather_rows(numbers.unsqueeze(0))  # (W, numbers)


def _difference(settings: list[dict[str, object]]) -> str:
    """Say in which of all ranks' settings two ranks differ first."""
    for name, first in settings[0].items():
        for rank, other in enumerate(settings):
            if other[name] != first:
                return (
                    f"the loss's {name} is {first} on rank 0 and {other[name]} on rank {rank}; "
                    "pass the same on all ranks"
                )
    return "the loss's arguments differ between the ranks; pass the same on all ranks"
