"""The stream as a dataset of PyTorch: the same global batches, and a state for any world size."""

from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from dist_vse import PairStream, UserError
from dist_vse.config import DataConfig
from tests.support.datasets import write_dataset
from tests.support.distributed import run_distributed

BATCH = 8


def tokenize(captions: list[str]) -> Tensor:
    return torch.tensor([[len(caption), ord(caption[0])] for caption in captions])


def _open(folder: Path, **options: int) -> PairStream:
    data = DataConfig(num_streams=4, num_workers=options.pop("num_workers", 0))
    return PairStream(
        str(folder), tokenize, global_batch_size=BATCH, image_size=8, options=data, **options
    )


def _take(stream: PairStream, steps: int) -> list[dict[str, Tensor]]:
    return list(islice(DataLoader(stream, batch_size=None), steps))


def _join(ranks: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    return [
        {name: torch.cat([batch[name] for batch in step]) for name in step[0]}
        for step in zip(*ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, {"train": [11, 9, 10]}, size=16)
    return folder


def _on_a_rank(folder: Path) -> tuple[list[dict[str, Tensor]], dict[str, object]]:
    stream = _open(folder, num_workers=1)
    return _take(stream, 3), stream.state_dict()


def test_two_ranks_read_the_batches_of_one_and_one_goes_on(folder: Path) -> None:
    whole = _take(_open(folder), 6)
    ranks = run_distributed(_on_a_rank, 2, folder)
    torch.testing.assert_close(_join([taken for taken, _ in ranks]), whole[:3], rtol=0, atol=0)
    assert ranks[0][1] == ranks[1][1]
    resumed = _open(folder)
    resumed.load_state_dict(ranks[0][1])
    torch.testing.assert_close(_take(resumed, 3), whole[3:], rtol=0, atol=0)
    assert not dist.is_initialized()


def test_each_loop_goes_on_where_the_last_one_ended(folder: Path) -> None:
    whole, stream = _take(_open(folder), 5), _open(folder)
    torch.testing.assert_close([*_take(stream, 2), *_take(stream, 3)], whole, rtol=0, atol=0)


def test_a_slip_is_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match="give its DataLoader num_workers=0"):
        next(iter(DataLoader(_open(folder), batch_size=None, num_workers=1)))
    with pytest.raises(UserError, match=r"\(6\) must be a multiple of num_streams \(8\)"):
        PairStream(str(folder), tokenize, global_batch_size=6)
    with pytest.raises(UserError, match="the state is that of seed 1"):
        _open(folder).load_state_dict({"seed": 1, "streams": []})
