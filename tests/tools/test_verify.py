"""`dist-vse verify`: exact where the code is right; where it isn't, exit code 1 and the row."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_vse import cli, distributed
from dist_vse.config import load_config
from dist_vse.engine.zero import ZeroEngine
from dist_vse.launch.environment import free_port
from dist_vse.losses.global_loss import GlobalLoss, LossOutput
from dist_vse.tools.verify.checks import check, describe
from dist_vse.tools.verify.loss import ragged_counts
from dist_vse.tools.verify.table import Row, compare, verdict
from tests.support.distributed import run_distributed

CASES: list[list[str]] = [
    ["loss.learn_temperature=true", "engine.zero_stage=3", "optim.clip_norm=2"],
    [
        "loss.name=convse++",
        "loss.warmup_samples=100",
        "model.head_hidden=2048",
        "loss.ignore_above=0.05",
    ],
    [
        "loss.name=siglip",
        "loss.duplicates=positive",
        "engine.zero_stage=2",
        "engine.coalesce=false",
    ],
    [
        "loss.name=info_nce",
        "loss.transport=ring",
        "engine.precision=bf16",
        "chunk_size=auto",
        "loss.teacher=t",
        "loss.distill_weight=0.5",
    ],
    ["loss.temperature=0.005", "loss.bf16_products=true", "cache.keep_graphs=0"],
    ["loss.name=dcl", "data.negatives=2", "loss.transport=ring", "loss.widths=[64,16]"],
]


def _codes() -> list[tuple[int, str]]:
    results = [check(load_config(None, case)) for case in CASES]
    return [(result.code, describe(result)) for result in results]


@pytest.mark.slow
@pytest.mark.parametrize(
    "world_size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))]
)
def test_the_shipped_code_is_exact(world_size: int) -> None:
    for found in run_distributed(_codes, world_size, timeout=110):
        for code, text in found:
            assert code == 0, text
        learned, _, siglip, *_, hard = (text for _, text in found)
        assert "gradient of negatives" in hard and "gradient of negatives" not in learned
        assert "movement of temperature" in learned and ", clipped" in learned
        assert "movement of bias" in siglip and "gradient of bias" in siglip
        assert (", ".join(map(str, ragged_counts(world_size))) + " pairs") in learned


def _off(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("off: ")]


def _mean_for_sum() -> tuple[int, str]:
    """Average the captions' gradients over the ranks where they must be summed."""
    whole = distributed.reduce_scatter_rows
    distributed.reduce_scatter_rows = lambda x: whole(x) / distributed.world_size()
    result = check(load_config(None))
    return result.code, describe(result)


def test_a_mean_for_a_sum_is_named() -> None:
    for code, text in run_distributed(_mean_for_sum, 2):
        assert code == 1
        assert any("gradient of text features: another direction" in x for x in _off(text)), text
        assert any("movement of text trunk" in x for x in _off(text)), text
        assert not any("image" in x for x in _off(text)), text


def _averaged_twice() -> tuple[int, str]:
    """Give each rank the plain gradient of the global loss, which the engine then averages."""
    whole = GlobalLoss.__call__

    def halved(self: GlobalLoss, *features: Any) -> LossOutput:
        loss, stats = whole(self, *features)
        part = loss / distributed.world_size()
        return LossOutput(part + (loss - part).detach(), stats)

    GlobalLoss.__call__ = halved  # type: ignore[method-assign]
    result = check(load_config(None))
    return result.code, describe(result)


@pytest.mark.slow
def test_a_gradient_averaged_twice_is_named() -> None:
    for code, text in run_distributed(_averaged_twice, 2):
        assert code == 1
        for name in ("gradient of image features", "movement of text trunk"):
            assert any(f"{name}: 0.5 times" in x and "1/W, a mean" in x for x in _off(text)), text


def _every_chunk_is_the_last() -> tuple[int, str]:
    """Drive DeepSpeed as is usual: under ZeRO 2 only one chunk's gradient survives, silently."""
    plain = ZeroEngine.backward

    def backward(self: ZeroEngine, loss: Tensor, *, last: bool) -> None:
        plain(self, loss, last=True)

    ZeroEngine.backward = backward  # type: ignore[method-assign]
    result = check(load_config(None, ["engine.zero_stage=2", "engine.coalesce=false"]))
    return result.code, describe(result)


@pytest.mark.slow
def test_a_lost_chunk_is_named() -> None:
    for code, text in run_distributed(_every_chunk_is_the_last, 2):
        assert code == 1
        assert "movement of image trunk: another direction" in text, text
        assert "off: loss alone" not in text


def test_numbers_that_are_not_finite_are_off() -> None:
    bad = compare("s", "n", torch.tensor([1.0, torch.nan]), torch.ones(2), 1.0)
    assert not bad.exact
    assert "not a finite number" in verdict([bad], 2)


def test_factors_are_put_in_words() -> None:
    for factor, words in ((4.0, "W, a sum stands"), (0.25, "1/W, a mean"), (0.9, "0.9 times")):
        assert words in verdict([Row("s", "n", factor, 1.0, abs(1 - factor), 1e-5)], 4)
    assert "another direction" in verdict([Row("s", "n", 1.0, 0.9, 0.1, 1e-5)], 4)


@pytest.mark.slow
def test_the_command_starts_its_own_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)  # another test's group of one leaves it
    assert cli.main(["verify", "loss.name=vse0", "--processes", "2"]) == 0
    out = capsys.readouterr().out
    assert "vse0 (gather) on 2 processes (cpu)" in out
    assert "exact: all" in out


def _launch(*arguments: str) -> list[tuple[int, str, str]]:
    """Start two ranks as a launcher does; return each one's exit code and output."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "dist_vse.tools.verify", *arguments],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found: list[Any] = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=100)
            found.append((rank.returncode, out, err))
    finally:
        for rank in ranks:
            rank.kill()
    return found


@pytest.mark.slow
def test_under_a_launcher_it_joins_the_group(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("loss: {name: convse++}\n")
    first, second = _launch(str(config), "engine.zero_stage=2")
    assert (first[0], second[0]) == (0, 0), first
    assert "convse++ (gather) on 2 processes" in first[1]
    assert "ZeRO 2, 2 chunks a rank, fp32" in first[1]
    assert second[1] == ""
    first, second = _launch("--processes", "3")
    assert (first[0], second[0]) == (2, 2)
    assert "error: --processes 3: the launcher has started 2" in first[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "error: nowhere.yaml: no such config"),
        (["loss.name=convs"], "error: the settings given: loss.name='convs' is unknown"),
        (
            ["--peer", "open_clip", "a.yaml"],
            "error: --peer open_clip takes no config",
        ),
        (["--processes", "0"], "error: --processes 0 must be at least 1"),
    ],
)
def test_a_users_slip_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
