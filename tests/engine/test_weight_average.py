"""The averaged weights: a function of samples, the same for every stage and number of ranks."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.engine import RunEngine
from dist_vse.engine.optimizer_state import Fragment
from dist_vse.engine.weight_average import WeightAverage, take_averages
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import Progress
from tests.support.distributed import run_distributed
from tests.support.engines import FSDP2
from tests.support.savers import B, build_engine, open_saver, take_step
from tests.support.tiny import tiny_model

STAGES = (0, 1, 2, 3, FSDP2 + 3)
HORIZON, STEPS = 2 * B, 4  # the mean of the first two steps, then exponential


def _average_of_a_walk(batch: int, total: int, horizon: int) -> float:
    """Return the average of weights that grow by 1 a sample."""
    weights = torch.zeros(1)
    average = WeightAverage([Fragment("a", 0, 1, weights, 0)], horizon)
    for seen in range(batch, total + 1, batch):
        weights += batch
        average.update(seen, batch)
    return average.dump()["ema/average/a/0"].item()


def test_it_is_the_mean_at_first_and_exponential_in_samples_then() -> None:
    assert _average_of_a_walk(10, 40, 10_000) == pytest.approx((10 + 20 + 30 + 40) / 4)
    # Of a walk of slope 1 it ends batch / (exp(batch / horizon) - 1) behind.
    for batch in (10, 20, 100):
        behind = batch / math.expm1(batch / 200)
        assert _average_of_a_walk(batch, 4000, 200) == pytest.approx(4000 - behind, rel=1e-5)


def test_whole_averages_come_from_the_files_of_all_ranks(tmp_path: Path) -> None:
    paths = [tmp_path / f"rank-{rank}.safetensors" for rank in range(2)]
    for path, start in zip(paths, (0, 2), strict=True):
        save_file({f"ema/average/a/{start}": torch.full((2,), 1.0 + start)}, path)
    weights = {"a": torch.zeros(2, 2), "frozen": torch.ones(1)}
    taken = take_averages(weights, paths)
    assert taken["a"].tolist() == [[1, 1], [3, 3]] and taken["frozen"].item() == 1
    assert weights["a"].sum() == 0
    with pytest.raises(UserError, match="lacks 2 elements of average of a; copy the files of all"):
        take_averages(weights, paths[:1])
    average = WeightAverage([Fragment("a", 1, 2, torch.zeros(3), 1)], HORIZON)
    average.load(paths)
    assert average.dump()["ema/average/a/1"].tolist() == [1, 3]


def _weights(model: DualEncoder) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _averages(engine: RunEngine) -> dict[str, Tensor]:
    with engine.gathered_parameters() as model:
        before = _weights(model)
    with engine.evaluation_weights() as model:
        averages = _weights(model)
    with engine.gathered_parameters() as model:
        changed = [name for name, p in _weights(model).items() if not torch.equal(p, before[name])]
    assert not changed, (engine.stage, changed)
    return averages


def _train(engine: RunEngine, first: int) -> list[dict[str, Tensor]]:
    """Take the steps from `first` on; return the weights after each."""
    found = []
    for step in range(first, STEPS):
        take_step(engine, step)
        engine.update_average((step + 1) * B, B)
        with engine.gathered_parameters() as model:
            found.append(_weights(model))
    return found


def _average_all(folder: Path, sources: list[Path]) -> dict[int, dict[str, Tensor]]:
    """Train at every stage, save after half of the steps, and go on from there and from others."""
    found = {}
    for stage in STAGES:
        engine = build_engine(stage, "sgd", HORIZON)
        state = engine.dump_optimizer()
        held = {name: values for name, values in state.items() if name.startswith("ema/")}
        trained = sum(p.numel() for p in tiny_model().parameters())
        if stage > 0:  # each rank has its share
            share = sum(values.numel() for values in held.values())
            assert share < trained / distributed.world_size()
        own = folder / str(stage)
        saver = None
        for step in range(STEPS):
            if step == STEPS // 2:
                if distributed.is_main_process():
                    own.mkdir(parents=True)
                distributed.barrier()
                saver = open_saver(own)
                saver.start(engine, Progress(step, step * B, [[0, 0]]), score=None)
                saver.finish()
                half = _averages(engine)
            take_step(engine, step)
            engine.update_average((step + 1) * B, B)
        found[stage] = _averages(engine)
        _resumes_to_the_bit(own, stage, half, found[stage])
        for source in sources:
            engine = build_engine(stage, "sgd", HORIZON)
            assert checkpoint.load_latest(source, engine) is not None
            _train(engine, STEPS // 2)
            error = max(_errors(_averages(engine), found[stage]))
            assert error < 1e-5, (stage, source, error)
    return found


def _resumes_to_the_bit(
    folder: Path, stage: int, half: dict[str, Tensor], end: dict[str, Tensor]
) -> None:
    path = checkpoint.latest(folder)
    assert path is not None
    model = tiny_model()
    checkpoint.load_weights(path, model)
    assert all(torch.equal(p, half[name]) for name, p in model.named_parameters()), stage
    engine = build_engine(stage, "sgd", HORIZON)
    assert checkpoint.load_latest(folder, engine) is not None
    assert all(torch.equal(p, half[name]) for name, p in _averages(engine).items()), stage
    _train(engine, STEPS // 2)
    assert all(torch.equal(p, end[name]) for name, p in _averages(engine).items()), stage


def _errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[float]:
    start = dict(tiny_model().named_parameters())
    return [
        ((found[name] - expected[name]).norm() / change).item()
        for name in expected
        if (change := (expected[name] - start[name]).norm()) > 0
    ]


def _by_hand() -> dict[str, Tensor]:
    """Return the average of one process's weights, computed from their list."""
    steps = _train(build_engine(0, "sgd"), 0)
    average = steps[0]
    for number, weights in enumerate(steps[1:], 2):
        share = max(1 - math.exp(-B / HORIZON), 1 / number)
        average = {k: a + share * (weights[k] - a) for k, a in average.items()}
    return average


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_every_stage_and_number_of_ranks_has_the_same_average(tmp_path: Path) -> None:
    (expected,) = run_distributed(_by_hand, 1)
    sources: list[Path] = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        results = run_distributed(_average_all, world_size, folder, sources, timeout=150)
        for found in results:
            for stage in STAGES:
                error = max(_errors(found[stage], expected))
                assert error < 1e-5, (world_size, stage, error)
        sources = [folder / "0", folder / "3", folder / str(FSDP2 + 3)]
