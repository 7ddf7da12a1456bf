"""The process group and what its ranks send each other, as `distributed.NAME`."""

from dist_vse.distributed.agreement import (
    any_rank,
    any_rank_each,
    first_failure,
    raise_on_all_ranks,
)
from dist_vse.distributed.collectives import (
    AsyncAllGather,
    AsyncReduce,
    AsyncSendRecv,
    all_gather_object,
    all_gather_rows,
    all_reduce_max,
    all_reduce_mean,
    all_reduce_min,
    all_reduce_sum,
    barrier,
    broadcast_object,
    gather_ragged_rows,
    gather_rows,
    reduce_scatter_rows,
)
from dist_vse.distributed.group import (
    device,
    is_main_process,
    main_process_only,
    process_group,
    rank,
    world_size,
)
from dist_vse.distributed.lost_rank import LostRankError, is_lost_rank

__all__ = [
    "AsyncAllGather",
    "AsyncReduce",
    "AsyncSendRecv",
    "LostRankError",
    "all_gather_object",
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_mean",
    "all_reduce_min",
    "all_reduce_sum",
    "any_rank",
    "any_rank_each",
    "barrier",
    "broadcast_object",
    "device",
    "first_failure",
    "gather_ragged_rows",
    "gather_rows",
    "is_lost_rank",
    "is_main_process",
    "main_process_only",
    "process_group",
    "raise_on_all_ranks",
    "rank",
    "reduce_scatter_rows",
    "world_size",
]
