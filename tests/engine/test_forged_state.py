"""A checkpoint's files that somebody else wrote, with right checksums: loaded, or one line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.common.random_state import random_state
from dist_vse.engine.loss_scale import LossScale
from dist_vse.engine.optimizer_state import Fragment, load_state, load_whole_state
from dist_vse.engine.weight_average import take_averages
from dist_vse.runs import checkpoint

RUN = "exp_avg/w/0"
LONG = "9" * 5000


def _adam(prefix: str) -> dict[str, Tensor]:
    keys = ("exp_avg", "exp_avg_sq")
    return {f"{prefix}/step": torch.tensor(2.0)} | {
        f"{prefix}/{k}/w/0": torch.ones(6) for k in keys
    }


def _read(kind: str, path: Path) -> object:
    """Read a file as the state of an optimizer of fragments, of one of whole tensors, or of EMA."""
    weight = nn.Parameter(torch.zeros(6))
    optimizer = torch.optim.AdamW([weight])
    if kind == "optim":
        load_state([Fragment("w", 0, 6, weight, 0)], optimizer, [path])
        weight.grad = torch.ones(6)
        optimizer.step()
        return optimizer.state[weight]["step"]
    if kind == "whole":
        load_whole_state({"w": weight}, optimizer, [path])
        return optimizer.state[weight]["step"]
    return take_averages({"w": torch.zeros(6)}, [path])["w"]


@pytest.mark.parametrize(
    "change",
    [
        {RUN: torch.ones(1, 6)},
        {RUN: torch.tensor(1.0)},
        {RUN: torch.ones(5)},
        {RUN: torch.ones(0)},
        {"exp_avg/w/x": torch.ones(6)},
        {"exp_avg/w/-3": torch.ones(6)},
        {f"exp_avg/w/{LONG}": torch.ones(6)},
        {"exp_avg/": torch.ones(6)},
        {"exp_avg/a/b/c": torch.ones(6)},
        {"step": torch.ones(7)},
        {"step": torch.tensor(-3.0)},
        {"step": torch.tensor(torch.nan)},
        {"step": None},
        {"": torch.ones(6)},
        {"exp_avg/w/00": torch.ones(6)},
    ],
    ids=lambda change: next(iter(change))[:12] + str(len(str(change))),
)
def test_the_state_of_fragments_is_checked(change: dict[str, Tensor], tmp_path: Path) -> None:
    forged = _adam("optim") | {f"optim/{name}": value for name, value in change.items()}
    save_file({k: v for k, v in forged.items() if v is not None}, tmp_path / "x")
    with pytest.raises(UserError, match=r"the checkpoint (holds|lacks)") as caught:
        _read("optim", tmp_path / "x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ema/average/w/0", torch.ones(2, 3)),
        ("ema/average/w/x", torch.ones(6)),
        ("ema/average/w/0", torch.ones(5)),
    ],
)
def test_averages_are_checked(name: str, value: Tensor, tmp_path: Path) -> None:
    save_file({"ema/average/w/0": torch.ones(6)}, tmp_path / "x")
    assert torch.equal(_read("average", tmp_path / "x"), torch.ones(6))  # type: ignore[arg-type]
    save_file({name: value}, tmp_path / "x")
    with pytest.raises(UserError, match=r"the checkpoint (holds|lacks)"):
        _read("average", tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("whole/step/int/v", torch.tensor(2)),
        ("whole/step/int", torch.tensor(2)),
        ("whole/step/int/w", torch.ones(3)),
        ("whole/step/float/w", torch.tensor(torch.inf)),
        ("group/lr/float", torch.tensor(9.0)),
        ("group/step", torch.tensor(9.0)),
        ("group/step/int/w", torch.tensor(9)),
    ],
)
def test_the_state_of_whole_tensors_is_checked(name: str, value: Tensor, tmp_path: Path) -> None:
    good = {"whole/step/int/w": torch.tensor(2), "group/k/int": torch.tensor(2)}
    save_file(good, tmp_path / "x")
    assert _read("whole", tmp_path / "x") == 2
    save_file(good | {name: value}, tmp_path / "x")
    with pytest.raises(UserError, match="the checkpoint holds"):
        _read("whole", tmp_path / "x")


@pytest.mark.parametrize(
    "state", [torch.ones(2), torch.tensor([1.0, torch.nan, 0]), -torch.ones(3)]
)
def test_the_loss_scale_is_checked(state: Tensor) -> None:
    LossScale().load(torch.tensor([2.0, 1, 0]))
    with pytest.raises(UserError, match="no loss scale of ours"):
        LossScale().load(state)


def test_the_random_state_is_checked(tmp_path: Path) -> None:
    now = random_state().cpu
    for state in (None, now[:9].clone(), torch.rand(5056), torch.tensor(3), torch.zeros_like(now)):
        save_file({"x": torch.ones(1)} if state is None else {"random/cpu": state}, tmp_path / "x")
        with pytest.raises(UserError, match="holds no random state of ours"):
            checkpoint._restore_random(tmp_path / "x")
    save_file({"random/cpu": now}, tmp_path / "x")
    checkpoint._restore_random(tmp_path / "x")
    assert torch.equal(random_state().cpu, now)
