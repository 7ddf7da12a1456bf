"""Chunk size and kept graphs that are found by trying: they fit, are agreed on, leave no trace."""

from pathlib import Path

import pytest
import torch

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.memory import measure
from dist_vse.common.random_state import random_state
from dist_vse.common.units import GIB
from dist_vse.config import ImageConfig, ModelConfig, TextConfig, TrainConfig
from dist_vse.models.pretrained import PooledTrunk
from dist_vse.training import chunking
from dist_vse.training.chunking import Chunking, Pairs, agree, choose_chunking, choose_chunks
from tests.support.distributed import run_distributed
from tests.support.tiny import tiny_batch, tiny_model

CPU = torch.device("cpu")
PAIRS = Pairs(image_size=32, num_tokens=8)


def _choose(
    memory_gib: float,
    *,
    rank_batch_size: int = 96,
    chunk_size: int | None = None,
    keep_graphs: int | None = None,
    max_live_graphs: int | None = None,
) -> Chunking:
    return choose_chunking(
        tiny_model(dropout=0.1),
        PAIRS,
        rank_batch_size=rank_batch_size,
        chunk_size=chunk_size,
        keep_graphs=keep_graphs,
        max_live_graphs=max_live_graphs,
        memory_gib=memory_gib,
        precision="fp32",
    )


def _graph_bytes(rows: int) -> int:
    model = tiny_model()
    images, tokens = tiny_batch(rows, 0)
    return measure(lambda: model(images, tokens), CPU)[1].held


def test_what_is_held_and_what_is_needed_at_most_are_told_apart() -> None:
    result, allocated = measure(lambda: torch.ones(1000, 1000).exp().sum(0), CPU)
    assert result.shape == (1000,)
    assert allocated.held == pytest.approx(4_000, abs=500)
    assert allocated.peak == pytest.approx(8_000_000, rel=0.01)


def test_the_largest_chunk_that_fits_is_taken() -> None:
    found = {gib: _choose(gib, keep_graphs=0).chunk_size for gib in (0.003, 0.006, 0.012, 4)}
    assert sorted(found.values()) == list(found.values())
    assert found[4] == 96
    assert 2 <= found[0.003] < found[0.006] < found[0.012] < 96
    assert all(96 % chunk_size == 0 for chunk_size in found.values())
    # It fits, and the next larger divisor would not.
    for gib, chunk_size in list(found.items())[:3]:
        larger = next(n for n in range(chunk_size + 1, 97) if 96 % n == 0)
        assert _peak(chunk_size) <= gib * GIB < _peak(larger)


def _peak(rows: int) -> int:
    found = chunking._try(tiny_model(), PAIRS, rows, False)
    assert found is not None
    return found.peak


def test_as_many_graphs_are_kept_as_fit() -> None:
    graph = _graph_bytes(8) / GIB
    assert _choose(3.5 * graph, chunk_size=8).keep_graphs == 3
    assert _choose(0.5 * graph, chunk_size=8).keep_graphs == 1
    assert _choose(100 * graph, chunk_size=8).keep_graphs == 12  # all of them
    assert _choose(100 * graph, chunk_size=8, max_live_graphs=1).keep_graphs == 1
    assert _choose(100 * graph, chunk_size=96).keep_graphs == 1
    assert _choose(0, chunk_size=8).keep_graphs == 12  # half of what is free is enough


def test_given_numbers_are_left_alone_and_nothing_is_tried() -> None:
    assert _choose(1e-9, chunk_size=32, keep_graphs=2) == Chunking(32, 2)


def test_no_room_for_the_smallest_chunk_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"not even 2 pairs fit in 1e-05 GiB: raise cache"
    ) as caught:
        _choose(1e-5)
    assert "\n" not in str(caught.value)


def test_a_try_leaves_no_trace() -> None:
    model = tiny_model(dropout=0.3)
    model.image.head.append(torch.nn.BatchNorm1d(16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = random_state()
    assert chunking._try(model, PAIRS, 4, True) is not None
    assert torch.equal(state.cpu, random_state().cpu)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_text_encoder_of_a_whole_checkpoint_is_tried_too() -> None:
    """It pools by itself, and so knows no padding token."""
    model = tiny_model()
    model.text.trunk = PooledTrunk(model.text.trunk)
    assert chunking._try(model, PAIRS, 4, False) is not None


@pytest.mark.parametrize(
    ("given", "device", "chunk"),
    [(None, "cpu", 64), (None, "cuda", 96), ("auto", "cpu", 96), (48, "cuda", 48)],
)
def test_where_it_is_left_out_a_gpu_tries_and_a_cpu_takes_64(
    given: int | str | None, device: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, image = TextConfig(max_tokens=8), ImageConfig(size=32)
    config = TrainConfig(
        chunk_size=given, global_batch_size=96, model=ModelConfig(image=image, text=text)
    )
    monkeypatch.setattr(distributed, "device", lambda: torch.device(device))
    assert choose_chunks(config, tiny_model()) == Chunking(chunk, 1)


def test_a_default_that_does_not_divide_is_refused_where_it_is_taken() -> None:
    config = TrainConfig(global_batch_size=96)
    config.check_world_size(1, on_gpu=True)
    with pytest.raises(UserError, match=r"times chunk_size \(64\) = 64; nearest: 64, 128"):
        config.check_world_size(1, on_gpu=False)


def _agreed() -> Chunking:
    return agree(Chunking(8 + distributed.rank(), 4 - distributed.rank()))


def test_ranks_agree_on_the_smallest() -> None:
    assert run_distributed(_agreed, 2) == [Chunking(8, 3)] * 2


def test_a_limit_of_any_enclosing_cgroup_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert chunking._cgroup_free(tmp_path, own) == float("inf")
    own.write_text("0::/slurm/job/step\n")
    step = tmp_path / "slurm" / "job" / "step"
    step.mkdir(parents=True)
    for folder, limit in ((step, "max"), (step.parent, "5000"), (step.parent.parent, "9000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("1000\n")
    assert chunking._cgroup_free(tmp_path, own) == 4000
