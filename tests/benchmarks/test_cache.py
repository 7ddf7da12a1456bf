"""The benchmark of gradient caching: the peers do the same work, and the table has every case."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.support.cache_memory import measure_memory
from benchmarks.support.cache_peers import open_clip_step
from benchmarks.support.workload import Workload, make_model, make_pairs
from dist_vse.engine.plain import PlainEngine
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.training.grad_cache import train_step
from tests.support.distributed import run_distributed

LOAD = Workload("test_vit", 32, text_width=64, text_depth=1, num_tokens=8, embedding=16)


def _sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def _update_errors() -> dict[str, float]:
    """Return how far OpenCLIP's step, driven by us, is from ours, by part of the model."""
    pairs = make_pairs(LOAD, 8)
    start, ours, theirs = make_model(LOAD), make_model(LOAD), make_model(LOAD)
    engine = PlainEngine(ours, _sgd(ours))
    pieces = zip(*(x.chunk(4) for x in pairs), strict=True)
    train_step(
        engine, GlobalLoss("info_nce"), [ours.prepare(images=i, tokens=t) for i, t in pieces]
    )
    step = open_clip_step(theirs, _sgd(theirs), pairs, 4)
    assert step is not None
    step()
    errors = {}
    for name in ("image", "text", "log_scale"):
        before, a, b = (
            torch.cat([p.flatten() for n, p in m.named_parameters() if n.startswith(name)])
            for m in (start, ours, theirs)
        )
        errors[name] = float((a - b).norm() / (a - before).norm())
    return errors


@pytest.mark.slow
def test_open_clips_loop_takes_the_same_step_on_our_model() -> None:
    for errors in run_distributed(_update_errors, 2):
        assert errors["image"] < 1e-4 and errors["text"] < 1e-4
        # Its gradient of the temperature is K times too large.
        assert abs(errors["log_scale"] - 3) < 1e-3


def test_memory_is_split_by_what_it_is_for() -> None:
    small, large = (measure_memory(LOAD, batch, 16) for batch in (32, 128))
    assert small["model_bytes"] == large["model_bytes"] > small["gradient_bytes"]
    assert large["input_bytes"] == 4 * small["input_bytes"]
    # The features and their gradients; their copies for the loss are gone by then.
    more = large["features_bytes"] - small["features_bytes"]
    assert 2 <= more / (96 * 2 * LOAD.embedding * 4) < 2.1


@pytest.mark.slow
def test_the_command_times_every_case_and_writes_the_numbers(tmp_path: Path) -> None:
    out = tmp_path / "cache.json"
    small = ["--image", "test_vit", "--size", "32", "--text-width", "64", "--processes", "1"]
    assert main(["cache", "--batch", "32", "--repeats", "1", *small, "--out", str(out)]) == 0
    report = json.loads(out.read_text())["figures"]
    assert len(report["speed"]["seconds"]) == 9
    assert all(len(s) == 1 and s[0] > 0 for s in report["speed"]["seconds"].values())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--repeats", "-1", "--repeats (-1) must be at least 0"),
        ("--chunks", "0", "--chunks (0) must be at least 1"),
        ("--batch", "100", "--batch (100) must be a multiple of --processes (2) times"),
        ("--grad-cache", "nowhere", "nowhere: no src/grad_cache in it"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", option, value]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
