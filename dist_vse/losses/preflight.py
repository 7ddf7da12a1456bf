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

NUMBERS = 7  # a rank's; a first one below 0 (it is the number of rows) says that it refuses
CLOSE = 1e-6  # the temperature's logarithm and the bias are alike if they differ by less


@dataclass(frozen=True)
class Metadata:
    """What all ranks must know of each other's features."""

    layout: Layout
    largest: float  # no |similarity| of the batch is larger
    smallest_own: float


def exchange_metadata(
    own: OwnPairs, log_scale: Tensor, bias: Tensor, settings: Mapping[str, object]
) -> Metadata:
    """Exchange a few numbers a rank; the host waits for the device here.

    Raises UserError, the same on every rank, where a rank refused its arguments or where
    log_scale (1,), bias (1,) or the settings differ between ranks.
    """
    infinity = own.similarities.new_full((1,), float("inf"))
    here = [
        torch.full_like(own.longest_row, len(own.similarities)),
        own.longest_row,
        own.longest_column,
        torch.cat([own.similarities, infinity]).amin(),
        log_scale.detach().view(()),
        bias.detach().view(()),
    ]
    numbers = torch.stack([x.double() for x in here])
    code = zlib.crc32(repr(settings).encode())
    there = _exchange(torch.cat([numbers, numbers.new_full((1,), code)])).T.tolist()
    counts, row_norms, column_norms, smallest, log_scales, biases, codes = there
    if min(counts) < 0:
        raise distributed.first_failure(distributed.all_gather_object(None))
    if len(set(codes)) > 1 or _spread(log_scales) > CLOSE or _spread(biases) > CLOSE:
        model = {"log_scale": float(log_scale), "bias": float(bias)}
        raise UserError(_difference(distributed.all_gather_object({**settings, **model})))
    layout = Layout(tuple(int(count) for count in counts), distributed.rank())
    return Metadata(layout, max(row_norms) * max(column_norms), min(smallest))


def refuse(fault: str) -> NoReturn:
    """Raise UserError for this rank's `fault`, here and on the ranks in `exchange_metadata`."""
    _exchange(torch.full((NUMBERS,), -1.0, dtype=torch.float64, device=distributed.device()))
    raise distributed.first_failure(distributed.all_gather_object(UserError(fault)))


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
