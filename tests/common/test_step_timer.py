"""Seconds by part: they add up, collectives are cut out, and every collective of a step is seen."""

import threading
import time
from collections.abc import Iterator
from itertools import groupby

import pytest
import torch

from dist_vse import distributed
from dist_vse.common import step_timer
from dist_vse.config import EngineConfig, OptimConfig
from dist_vse.engine import Engine
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.engine.zero import ZeroEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.tools.bench.traffic import bytes_sent_by_part
from dist_vse.training.grad_cache import train_step
from tests.support.distributed import run_distributed
from tests.support.tiny import tiny_batch, tiny_model

B, D = 16, 16  # pairs, embedding


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every look at the clock is a second after the one before."""
    seconds = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))
    yield
    step_timer.begin(step_timer.OTHER)


def test_parts_add_up_and_collectives_are_cut_out(ticking: None) -> None:
    watch = step_timer.Clock(torch.device("cpu"))
    with step_timer.listening(watch):  # 0
        step_timer.begin("encode")  # 1
        step_timer.begin("loss")  # 2
        with step_timer.collective(), step_timer.collective():  # 3, 4 .. 5, 6
            assert step_timer.current() == "gather"
        step_timer.begin("step")  # 7
        with step_timer.collective():  # 8 .. 9
            assert step_timer.current() == "reduce"
        step_timer.begin("data")  # 10
        with step_timer.collective():  # 11 .. 12
            assert step_timer.current() == "data"
        seconds = watch.read()  # 13
    assert {part: taken for part, taken in seconds.items() if taken} == {
        "other": 1,
        "encode": 1,
        "loss": 2,
        "gather": 3,
        "step": 2,
        "reduce": 1,
        "data": 3,
    }
    assert watch.read()["data"] == 1  # what was read is not told again


def test_what_another_thread_starts_belongs_to_no_part(ticking: None) -> None:
    def start() -> None:
        with step_timer.collective():
            assert step_timer.current() == "second_pass"

    watch = step_timer.Clock(torch.device("cpu"))
    with step_timer.listening(watch):  # 0
        step_timer.begin("second_pass")  # 1
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        seconds = watch.read()  # 2
    assert seconds["second_pass"] == 1 and seconds["reduce"] == 0


def test_no_part_is_noted_after_the_block() -> None:
    watch = step_timer.Clock(torch.device("cpu"))
    with pytest.raises(RuntimeError), step_timer.listening(watch):
        raise RuntimeError
    watch.read()
    step_timer.begin(step_timer.OTHER)
    assert watch.read()["encode"] == 0


class _Parts:
    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, part: str) -> None:
        self.told.append(part)


def _step(stage: int | None) -> tuple[list[str], dict[str, float]]:
    """Return the parts of a step in order, and the bytes that are sent in each."""
    model, rank = tiny_model(), distributed.rank()
    optimizer = build_optimizer(model, OptimConfig(name="sgd", lr=0.05, weight_decay=0.0))
    engine: Engine = PlainEngine(model, optimizer)
    if stage is not None:
        engine = ZeroEngine(model, optimizer, EngineConfig(stage), rank_batch_size=B // 2)
    images, tokens = (x.chunk(2)[rank] for x in tiny_batch(B, 0))
    pieces = zip(images.chunk(2), tokens.chunk(2), strict=True)
    chunks = [model.prepare(images=i, tokens=t) for i, t in pieces]

    def step() -> None:
        train_step(engine, GlobalLoss("convse"), chunks)

    step()  # ZeRO 3 learns the order of its modules
    parts = _Parts()
    with step_timer.listening(parts):
        sent = bytes_sent_by_part(step)
    return [part for part, _ in groupby(parts.told)], sent


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_every_collective_of_a_step_is_gather_or_reduce(stage: int | None) -> None:
    told, sent = run_distributed(_step, 2, stage)[0]
    parameters = 4 * sum(p.numel() for p in tiny_model().parameters())
    assert sent.keys() == {"gather", "reduce"}
    # Half of the features forward, half of their gradients back, and statistics.
    features = B * D * 4
    assert features <= sent["gather"] < features + 1024
    # Two ranks: a reduction and an all-gather of the weights each send half of them; ZeRO 3
    # gathers them for every forward and backward.
    assert parameters * 0.99 <= sent["reduce"] <= parameters * (4 if stage == 3 else 1.01)
    plain = [part for part in told if part not in ("gather", "reduce")]
    assert [part for part, _ in groupby(plain)] == [
        "other",
        "encode",
        "loss",
        "second_pass",
        "step",
        "other",
    ]


@pytest.mark.parametrize(
    ("host", "device", "share"),
    [
        # The host makes a mark every 0.1 s, and waits at the end until the GPU is done.
        ([0.0, 0.1, 0.2, 0.3, 1.0], [0.0, 0.3, 0.6, 1.0, 1.0], 1.0),  # the GPU is always behind
        ([5.0, 5.1, 5.2, 5.3, 5.4], [0.0, 0.1, 0.2, 0.3, 0.4], 0.0),  # it waits for every launch
        ([0.0, 0.5, 1.0, 2.0], [0.0, 0.5, 1.5, 2.0], 0.5),  # behind once: 0.5 s, then 0.5 s left
        ([1.0, 1.0], [0.0, 0.0], None),
    ],
)
def test_the_share_of_a_gpu_that_has_work_queued(
    host: list[float], device: list[float], share: float | None
) -> None:
    found = step_timer.queued_share(host, device)
    assert found == (share if share is None else pytest.approx(share))


class _Event:
    """An event that a GPU reaches a quarter of a second after the host has recorded it."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.reached = time.perf_counter() + 0.25

    def elapsed_time(self, later: "_Event") -> float:
        return 1000 * (later.reached - self.reached)


def test_a_clock_of_a_gpu_knows_the_share(ticking: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    watch = step_timer.Clock(torch.device("cuda"))
    with step_timer.listening(watch):
        for _ in range(3):
            step_timer.begin("encode")
        seconds = watch.read()
        assert seconds["encode"] == 6.0 and seconds["other"] == 2.0  # two looks a mark
        assert watch.device_share == 0.0  # at the same pace as the host
        assert watch.read()["encode"] == 2.0
