"""Decisions that every rank must take alike: a flag, or an error, of one rank counts for all."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from dist_vse.common.errors import UserError
from dist_vse.distributed.collectives import all_gather_object, all_reduce_max
from dist_vse.distributed.group import world_size


def any_rank(flag: bool) -> bool:
    """Return, alike on every rank, whether the flag is set on any of them."""
    return any_rank_each([flag])[0]


def any_rank_each(flags: Sequence[bool]) -> list[bool]:
    """Return for several flags, in one reduction, whether each is set on any rank."""
    if world_size() == 1:
        return list(flags)
    numbers = torch.tensor([float(flag) for flag in flags])  # on the host: no GPU is waited for
    return [number > 0 for number in all_reduce_max(numbers).tolist()]


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """End the block alike on every rank: a UserError on one rank is raised on all of them.

    Costs one number's reduction where nothing is wrong, and every rank must run the same block.
    Other exceptions are faults of ours: they end this rank, and the launcher ends the others.
    """
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    if world_size() == 1:
        if failure is not None:
            raise failure
        return
    if not any_rank(failure is not None):
        return
    raise first_failure(all_gather_object(failure))


def first_failure(failures: Sequence[UserError | None]) -> UserError:
    """Return the first of all ranks' failures; it names its rank where only that one has it."""
    rank, first = next((rank, f) for rank, f in enumerate(failures) if f is not None)
    alone = len(failures) > 1 and [str(f) for f in failures].count(str(first)) == 1
    return type(first)(f"{first} (on rank {rank})") if alone else first
