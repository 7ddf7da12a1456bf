"""The plan: its arithmetic, compared with the real loss and engine, and its command."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.tools.bench.scale_cases import SMALL
from dist_vse.tools.bench.scale_harness import StepHarness, build_harness
from dist_vse.tools.bench.scale_memory import measure_memory
from dist_vse.tools.bench.traffic import bytes_sent_by_part
from dist_vse.tools.plan.check import check_rows
from dist_vse.tools.plan.choose import MARGIN, check_batch, choose, explain, price
from dist_vse.tools.plan.count import count_work
from dist_vse.tools.plan.hardware import LinkConfig, load_hardware
from dist_vse.tools.plan.memory import Place, fullest, moments
from dist_vse.tools.plan.seconds import loss_seconds
from dist_vse.tools.plan.settings import Settings, settings_of
from dist_vse.tools.plan.step_memory import StepMemory, step_memory
from dist_vse.tools.plan.traffic import (
    Collective,
    engine_collectives,
    feature_collectives,
    loss_collectives,
    sent_bytes,
)
from tests.support.distributed import run_distributed
from tests.support.plans import GPU, WORK, case

HARDWARE = sorted(Path("configs/hardware").glob("*.yaml"))
GOLDEN_PARAMETERS = (380032, 2)
GOLDEN_CHOICE = (1024, 1, 1, 0, "ring")
GOLDEN_NUMBERS = [0.011093, 0.51845, 0.62213]  # seconds, GiB, efficiency


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all_gather", 300), ("reduce_scatter", 300), ("reduce", 300), ("all_reduce", 600)],
)
def test_what_a_ring_of_four_sends(kind: str, sent: float) -> None:
    assert Collective(kind, 400).sent(4) == sent
    assert Collective(kind, 400, calls=3).sent(4) == 3 * sent
    assert Collective(kind, 400).sent(1) == 0


def test_two_levels_of_the_network_set_the_time() -> None:
    fast = LinkConfig(alpha_us=1, copy_gb_per_s=100, reduce_gb_per_s=100, pair_gb_per_s=100)
    slow = LinkConfig(alpha_us=5, copy_gb_per_s=10, reduce_gb_per_s=10, pair_gb_per_s=2)
    hardware = replace(GPU, inside=fast, between=slow)
    gather = Collective("all_gather", 16e9)
    assert gather.seconds(hardware, 8) == pytest.approx(7e-6 + 14e9 / 100e9)
    assert gather.seconds(hardware, 16) == pytest.approx(7e-6 + 5e-6 + 15e9 / 10e9)
    message = Collective("exchange", 1e9, calls=3)
    assert message.seconds(hardware, 16) == pytest.approx(3 * (5e-6 + 0.5))


CASES: list[list[str]] = [
    ["engine.zero_stage=0"],
    ["engine.zero_stage=2", "engine.precision=bf16"],
    ["engine.zero_stage=1", "loss.name=convse++"],
    ["engine.zero_stage=3", "cache.keep_graphs=2"],
    ["loss.bf16_products=true"],
    ["loss.bf16_products=true", "loss.transport=ring"],
    ["data.negatives=2"],
]


def _measured(cases: list[list[str]]) -> list[tuple[dict[str, float], int]]:
    """Return what the real step sends by part, and the most that it holds."""
    found = []
    for words in cases:
        build = partial(build_harness, case(words), stream=False)
        harness, memory = measure_memory(build, StepHarness.step)
        found.append((bytes_sent_by_part(harness.step), max(memory.peaks.values())))
    return found


@pytest.mark.slow
def test_bytes_and_memory_are_those_of_the_real_step() -> None:
    plain, bf16, more = (
        count_work(case(words), vocabulary=8192) for words in ([], CASES[1], CASES[-1])
    )
    measured = run_distributed(_measured, 2, CASES, timeout=100)[0]
    for words, (sent, peak) in zip(CASES, measured, strict=True):
        work = bf16 if "engine.precision=bf16" in words else plain
        work = more if "data.negatives=2" in words else work
        chosen = settings_of(case(words), global_batch=32, world_size=2, on_cpu=True)
        loss = sent_bytes(loss_collectives(chosen, work.embed_dim), 2)
        engine = sent_bytes(engine_collectives(work, chosen), 2)
        assert sent["gather"] == pytest.approx(loss, rel=1e-3), words
        # ZeRO 3 gathers a module now and then once more.
        rest = sum(sent.values()) - sent["gather"]
        assert rest == pytest.approx(engine, rel=0.05 if chosen.zero_stage == 3 else 0.001), words
        predicted = fullest(moments(work, chosen, Place(on_cpu=True))).total
        assert predicted == pytest.approx(peak, rel=0.1), words


def test_texts_without_an_image_are_further_columns() -> None:
    plain, more = (
        settings_of(case(words), global_batch=32, world_size=2, on_cpu=True)
        for words in ([], ["data.negatives=2"])
    )
    assert more.columns == 3 * plain.columns == 96
    assert sent_bytes(feature_collectives(more, 16), 2) == 3 * sent_bytes(
        feature_collectives(plain, 16), 2
    )
    assert loss_seconds(WORK, more, GPU) == pytest.approx(3 * loss_seconds(WORK, plain, GPU))
    fuller, full = (fullest(moments(WORK, s, Place(on_cpu=True))) for s in (more, plain))
    assert fuller.total > full.total


_SETTINGS = st.builds(
    lambda ranks, rows, parts, **rest: Settings(
        2**ranks * 2**rows, 2**ranks, max(1, 2**rows >> parts), **rest
    ),
    st.integers(0, 9),
    st.integers(0, 12),
    st.integers(0, 6),
    keep_graphs=st.integers(0, 8),
    zero_stage=st.integers(0, 3),
    transport=st.sampled_from(["gather", "ring"]),
    loss=st.sampled_from(["convse", "convse++", "siglip"]),
)


@settings(deadline=None)
@given(chosen=_SETTINGS)
def test_what_must_grow_grows(chosen: Settings) -> None:
    one = price(WORK, chosen, GPU)
    assert one.memory.total == pytest.approx(sum(one.memory.parts().values()))
    assert one.memory.total == max(m.total for m in one.moments)
    assert one.seconds.total == pytest.approx(sum(one.seconds.parts().values()))
    assert 0 < one.seconds.efficiency <= 1 + 1e-9
    doubled = price(WORK, chosen.changed(global_batch=2 * chosen.global_batch), GPU)
    assert doubled.seconds.total > one.seconds.total
    assert doubled.memory.total >= one.memory.total
    fewer, more = (
        price(WORK, chosen.changed(keep_graphs=max(1, chosen.keep_graphs) + i), GPU) for i in (0, 1)
    )
    assert more.seconds.total <= fewer.seconds.total + 1e-12
    # Where all are kept, none is made again during the gradients: a little less.
    assert more.memory.total >= 0.97 * fewer.memory.total


@settings(deadline=None, max_examples=10)
@given(memory=st.integers(4, 80), ranks=st.sampled_from([1, 8, 64]))
def test_what_is_recommended_fits_or_says_that_nothing_does(memory: int, ranks: int) -> None:
    hardware = replace(GPU, memory_gib=float(memory))
    plan = choose(WORK, Settings(4096, ranks, 64), hardware)
    assert plan.fits == (plan.memory.total <= MARGIN * (memory - 1) * 2**30)
    assert plan.settings.global_batch == 4096 and plan.settings.world_size == ranks
    assert plan.settings.rank_batch % plan.settings.chunk == 0
    assert explain(plan, WORK).startswith("doesn't fit") == (not plan.fits)


def test_more_memory_never_makes_a_plan_slower() -> None:
    start = Settings(32768, 8, 64)
    taken = [
        choose(WORK, start, replace(GPU, memory_gib=float(gib))).seconds.total
        for gib in (8, 16, 40, 80)
    ]
    assert all(b <= a * 1.03 for a, b in pairwise(taken)), taken


@pytest.mark.parametrize("path", HARDWARE, ids=lambda path: path.stem)
def test_shipped_hardware_loads(path: Path) -> None:
    hardware = load_hardware(path)
    assert hardware.name != "unnamed"
    assert hardware.rank_memory(8) > 0
    assert bool(hardware.checked) == (path.stem == "epyc_2cores")  # the GPUs were never measured


@pytest.mark.slow
def test_golden_plan_of_a_shipped_config() -> None:
    config = load_config("configs/debug_cpu.yaml")
    hardware = load_hardware("configs/hardware/a100_80g.yaml")
    work = count_work(config, vocabulary=1000)
    start = settings_of(config, global_batch=65536, world_size=64, on_cpu=False)
    plan = choose(work, start, hardware)
    one = plan.settings
    assert (work.trainable, work.frozen) == GOLDEN_PARAMETERS
    assert (one.chunk, one.num_chunks, one.kept, one.zero_stage, one.transport) == GOLDEN_CHOICE
    found = [plan.seconds.total, plan.memory.total / 2**30, plan.seconds.efficiency]
    assert found == pytest.approx(GOLDEN_NUMBERS, rel=0.02)


@pytest.mark.parametrize(
    ("batch", "ranks", "message"),
    [(100, 8, "nearest: 96, 104"), (120, 12, "nodes of 8"), (0, 8, "at least 1")],
)
def test_batches_that_cannot_be(batch: int, ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_batch(batch, ranks, GPU)


def test_a_measured_row_is_checked_against_its_own_settings() -> None:
    config = load_config(None, list(SMALL))
    row: dict[str, Any] = {
        "series": "base", "runs": 1, "nodes": 1, "world_size": 2, "global_batch": 512,
        "chunk_size": 32, "keep_graphs": 3, "zero_stage": 2, "coalesce": True, "loss": "convse++",
        "transport": "ring", "precision": "fp32", "all_step_seconds": [2.0, 1.0],
        "memory_bytes": {"peak": 1000},
    }  # fmt: skip
    other = {**row, "precision": "bf16"}
    (checked,) = check_rows({"rows": [row, other, {**row, "runs": 2}]}, config, WORK, GPU)
    one = checked.plan.settings
    assert (one.chunk, one.kept, one.zero_stage, one.loss, one.ring) == (32, 3, 2, "convse++", True)
    assert checked.time_error == pytest.approx(checked.plan.seconds.total - 1)
    assert checked.memory_error == pytest.approx(checked.plan.memory.total / 1000 - 1)


@pytest.mark.slow
def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    words = ["configs/debug_cpu.yaml", "--gpus", "8", "4096", "--batch", "8192", "--out", str(out)]
    assert cli.main(["plan", *words]) == 0
    printed = capsys.readouterr().out
    assert "A100 80 GB, 8 a node: not checked" in printed
    assert "8 GPUs: " in printed and "chunk_size=" in printed and "data.num_streams=4096" in printed
    written = json.loads(out.read_text())
    assert [row["world_size"] for row in written["plans"]] == [8, 4096]
    assert all(row["fits"] for row in written["plans"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such config"),
        (["configs/debug_cpu.yaml", "--hardware", "no.yaml"], "no.yaml: no such"),
        (["configs/debug_cpu.yaml", "--gpus", "7"], "--batch (32) must be a multiple of --gpus"),
        (["--check", "no.json"], "no.json: can't be read"),
    ],
)
def test_a_slip_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_step_needs_its_states_at_least_and_less_without_adams_moments() -> None:
    def memory(*words: str, world_size: int = 2) -> StepMemory:
        return step_memory(
            case(list(words)), world_size, parameters=(1000, 800), vocabulary=100, on_cpu=True
        )

    adam, plain = memory(), memory("optim.name=sgd")
    assert adam.states == 4 * (1000 + 800 + 800 * 3 / 2)  # ZeRO 1 shares the last
    assert plain.states == 4 * (1000 + 800 + 800 / 2)
    assert memory("engine.zero_stage=3").states == adam.states - 4 * 1800 / 2
    assert plain.peak < adam.peak > adam.states
    work = count_work(case([]), vocabulary=100)
    assert adam.peak - plain.peak == pytest.approx(2 * work.gradient_bytes / 2)
    with pytest.raises(UserError, match="multiple of"):
        memory(world_size=3)


def test_the_plan_needs_no_measurement() -> None:
    for path in Path("dist_vse/tools/plan").glob("*.py"):
        assert "dist_vse.tools.bench" not in path.read_text(encoding="utf-8"), path
