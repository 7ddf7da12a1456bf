"""How large a tile is: a CPU's caches or a GPU's memory decide."""

import pytest
import torch

from dist_vse.losses.tiles import CPU_TILE, cuda_tile, default_tile, tile_shape


@pytest.mark.parametrize(
    ("gib", "size"), [(2, 3072), (16, 9216), (40, 14336), (80, 16384), (192, 16384), (0.1, 1024)]
)
def test_a_tile_and_its_workspace_fill_a_share_of_a_gpus_memory(gib: float, size: int) -> None:
    memory = int(gib * 2**30)
    assert cuda_tile(memory) == size
    height, width = tile_shape(size, dense=True)
    if 1024 < size < 16384:
        larger, wider = tile_shape(size + 1024, dense=True)
        assert 8 * height * width <= memory / 16 < 8 * larger * wider


def test_a_cpu_has_its_own_tile() -> None:
    assert default_tile(torch.device("cpu")) == CPU_TILE
