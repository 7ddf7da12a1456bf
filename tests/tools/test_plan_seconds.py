"""The plan's seconds: what caching, the loss, ZeRO's hooks and reductions take of a step."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_vse.tools.plan.calibrate import _with_hooks
from dist_vse.tools.plan.choose import price
from dist_vse.tools.plan.count import build_for_plan
from dist_vse.tools.plan.hardware import ChunkSpeed, Hardware
from dist_vse.tools.plan.seconds import interpolate, step_seconds
from dist_vse.tools.plan.settings import Settings
from dist_vse.tools.plan.traffic import engine_collectives, total_seconds
from tests.support.distributed import run_distributed
from tests.support.plans import GPU, WORK, case


@given(chunks=st.integers(1, 64), kept=st.integers(0, 64))
def test_kept_graphs_save_their_second_forward(chunks: int, kept: int) -> None:
    speed = ChunkSpeed(model="made up", rows=8, forward_s=1.0, graph_s=1.0, backward_s=2.0)
    hardware = replace(GPU, chunks=[speed])
    step = step_seconds(WORK, Settings(8 * chunks, 1, 8, keep_graphs=kept), hardware)
    share = 1 + (chunks - min(kept, chunks)) / (3 * chunks)
    assert step.encode + step.second_pass == pytest.approx(3 * chunks * share)
    assert step.useful == pytest.approx(3 * chunks)


def test_zero_3s_hooks_cost_once_a_forward_and_once_a_backward() -> None:
    speed = ChunkSpeed(model="made up", rows=8, hooks_forward_s=1.0, hooks_backward_s=100.0)
    hardware = replace(GPU, chunks=[speed])
    chosen = Settings(32, 1, 8, keep_graphs=1, zero_stage=3)  # four chunks
    step, plain = (step_seconds(WORK, chosen.changed(zero_stage=s), hardware) for s in (3, 1))
    assert (step.encode - plain.encode, step.second_pass - plain.second_pass) == (4.0, 403.0)


def _hooks() -> tuple[dict[str, float], dict[str, float]]:
    """Return what ZeRO 3 adds to chunks that take no time, and to such as take for ever."""
    config, added = case([]), []
    for plain in (0.0, 1e9):
        model = build_for_plan(config, 64, "cpu").train()
        chunk = {"rows": 4, "graph_s": plain, "backward_s": plain}
        (found,) = _with_hooks(config, model, [chunk], rounds=1)
        added.append({name: found[name] for name in found.keys() - chunk.keys()})
    return added[0], added[1]


@pytest.mark.slow
def test_zero_3s_hooks_are_what_it_takes_beyond_a_plain_chunk() -> None:
    for whole, nothing in run_distributed(_hooks, 2):
        assert whole.keys() == {"hooks_forward_s", "hooks_backward_s"}
        assert min(whole.values()) > 0
        assert set(nothing.values()) == {0.0}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_hide_behind_the_last_backward(stage: int) -> None:
    chosen = Settings(32, 2, 8, zero_stage=stage)
    every = engine_collectives(WORK, chosen)
    whole, gradients = (total_seconds(c, GPU, 2) for c in (every, every[:1]))
    hidden = {}
    for backward in (0.0, gradients / 10, 1e9):
        speed = ChunkSpeed(model="made up", rows=8, together=2, backward_s=backward)
        step = step_seconds(WORK, chosen, replace(GPU, chunks=[speed]))
        hidden[backward] = whole - step.reduce
    last = WORK.last / WORK.trainable  # of them is there when the backward ends
    wanted = [0, gradients / 10, gradients * (1 - last)] if stage < 3 else [0, 0, 0]
    assert list(hidden.values()) == pytest.approx(wanted, abs=1e-12)


def test_products_of_the_loss() -> None:
    hardware = replace(GPU, fp32_tflops=1e-12, attained_loss=1.0, memory_gb_per_s=1e12)
    chosen = Settings(64, 4, 16, loss_gib=0.0)
    product = 2 * 16 * 64 * WORK.embed_dim
    for loss, budget, times in (("convse", 0.0, 4), ("convse", 1.0, 3), ("convse++", 0.0, 1)):
        step = step_seconds(WORK, chosen.changed(loss=loss, loss_gib=budget), hardware)
        assert step.loss == pytest.approx(times * product), (loss, budget)


def test_ranks_that_share_cores_share_their_speed() -> None:
    cpu = Hardware(name="two cores", cores=2, ranks_per_node=1024)
    two, four = (price(WORK, Settings(64 * w, w, 64), cpu) for w in (2, 4))
    assert four.seconds.encode == pytest.approx(2 * two.seconds.encode)
    assert four.rank_memory < two.rank_memory


def test_interpolation_keeps_to_what_was_measured() -> None:
    points = [(4, 1.0), (16, 3.0)]
    found = [interpolate(points, x) for x in (1, 4, 8, 16, 99)]
    assert found == pytest.approx([1.0, 1.0, 2.0, 3.0, 3.0])
