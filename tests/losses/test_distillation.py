"""The divergence from a teacher: equal to one process that holds all similarities, on any ranks."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_vse import cli, distributed
from dist_vse.common.errors import UserError
from dist_vse.config import LossConfig
from dist_vse.data.samples import Batch
from dist_vse.data.teacher import Teacher as TeacherFile
from dist_vse.data.teacher import with_teacher
from dist_vse.losses.distillation import DistilledLoss, Teacher, divergence
from dist_vse.losses.global_loss import GlobalLoss
from dist_vse.losses.options import LossOptions
from dist_vse.losses.reference import divergence as dense_divergence
from tests.support.distributed import run_distributed
from tests.support.loss_cases import Case, error
from tests.support.runs import read_logged, run, settings, trained_run

ROWS = {1: (10,), 2: (7, 3), 3: (7, 0, 3)}
COUNT = 10


def _teacher(part: slice, temperature: float) -> Teacher:
    made = torch.randn(2, COUNT, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    images, captions = functional.normalize(made, dim=2)[:, part].unbind()
    return Teacher(images, captions, temperature, weight=0.5)


def _gradients(case: Case, term: Any) -> list[Tensor]:
    """Return the term and its gradients in images, captions and log_scale."""
    leaves = case.leaves(torch.float64)[:3]
    value = term(*leaves)
    return [value.detach().view(()), *torch.autograd.grad(value, leaves)]


def _dense(images: Tensor, captions: Tensor, log_scale: Tensor, temperature: float) -> Tensor:
    teacher = _teacher(slice(None), temperature)
    logits = images @ captions.T * log_scale.exp()
    return dense_divergence(logits, teacher.images @ teacher.captions.T / temperature)


def _errors(temperatures: tuple[float, ...] = (0.1, 0.01)) -> dict[str, float]:
    world_size = distributed.world_size()
    start = sum(ROWS[world_size][: distributed.rank()])
    errors = {}
    for transport, temperature, tile in itertools.product(
        ("gather", "ring"), temperatures, (2, 64)
    ):
        case = Case("convse", COUNT, temperature=0.07)
        exact = _gradients(case, lambda *x, t=temperature: _dense(*x, t))
        case.part = slice(start, start + ROWS[world_size][distributed.rank()])
        teacher = _teacher(case.part, temperature)
        options = LossOptions(transport=transport, tile=tile)
        found = _gradients(case, lambda *x, t=teacher, o=options: divergence(*x, t, o))
        features = [distributed.all_gather_rows(x) / world_size for x in found[1:3]]
        means = [distributed.all_reduce_mean(x.clone()) for x in (found[0], found[3])]
        ours = [means[0], *features, means[1]]
        errors[f"{transport} {temperature} {tile}"] = error(ours, exact)
    return errors


def test_a_second_derivative_is_refused() -> None:
    leaves = Case("convse", COUNT).leaves(torch.float64)[:3]
    value = divergence(*leaves, _teacher(slice(None), 0.1), LossOptions())
    with pytest.raises(UserError, match="no second derivative"):
        torch.autograd.grad(value, leaves, create_graph=True)


def test_the_divergence_is_that_of_the_dense_formula() -> None:
    assert max(_errors().values()) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ragged_ranks_equal_one_process(world_size: int) -> None:
    for errors in run_distributed(_errors, world_size):
        assert len(errors) == 8 and max(errors.values()) < 1e-10, errors


def test_a_model_like_its_teacher_has_no_divergence() -> None:
    case = Case("convse", COUNT, temperature=0.05)
    images, captions, log_scale, bias = case.leaves(torch.float32)
    teacher = Teacher(images.detach(), captions.detach(), 0.05, weight=2.0)
    term = divergence(images, captions, log_scale, teacher, LossOptions())
    gradient = torch.autograd.grad(term, images)[0]
    assert abs(term.item()) < 1e-5 and gradient.abs().max() < 1e-5
    other = _teacher(slice(None), 0.1)
    both = DistilledLoss(GlobalLoss("convse"), other, LossOptions())
    output = both(images, captions, log_scale, bias)
    alone = GlobalLoss("convse")(images, captions, log_scale, bias).loss
    torch.testing.assert_close(output.loss, alone + 0.5 * output.stats["distillation"])


def test_settings_that_do_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"loss\.distill_weight \(1\.0\) needs the teacher's"):
        LossConfig(distill_weight=1.0)
    with pytest.raises(UserError, match=r"loss\.teacher \(x\) would not be used"):
        LossConfig(teacher="x")
    LossConfig(teacher="x", ignore_above=0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": [40, 24], "val": [8]}
    return trained_run(tmp_path_factory.mktemp("run"), splits, "total_steps=2")


def _batch(ids: Tensor, text_ids: Tensor) -> Batch:
    none = torch.zeros(len(ids), 1, dtype=torch.int64)
    return Batch(none, none, ids, text_ids, none, np.zeros((0, 2), np.int64), ())


@pytest.mark.slow
def test_a_run_learns_from_stored_features_on_any_number_of_ranks(
    trained: Path, tmp_path: Path
) -> None:
    shards, file = trained.parent / "shards", tmp_path / "teacher.safetensors"
    assert cli.main(["embed", str(trained), str(file), "--split", "train"]) == 0
    teacher = TeacherFile(file)
    with pytest.raises(UserError, match="has no features of captions"):
        list(with_teacher(iter([_batch(teacher._images._ids[:2], torch.arange(2))]), teacher))
    curves = []
    for world_size, transport in ((1, "gather"), (2, "ring")):
        run_dir = tmp_path / f"w{world_size}"
        more = ["total_steps=3", "log_every=1", "optim.name=sgd", "optim.lr=0.05"]
        more += [f"loss.teacher={file}", "loss.distill_weight=0.5", "loss.ignore_above=0"]
        more += [f"loss.transport={transport}", "seed=5"]
        overrides = settings(shards, run_dir, *more)
        assert run_distributed(run, world_size, overrides, timeout=110) == [0] * world_size
        curves.append([read_logged(run_dir, n) for n in ("loss", "distillation", "ignored_share")])
    assert curves[1][0] == pytest.approx(curves[0][0], abs=1e-4)
    assert curves[1][1] == pytest.approx(curves[0][1], abs=1e-4)
    assert curves[1][2] == curves[0][2] and min(curves[0][2]) > 0
    wrong = settings(shards, tmp_path / "x", f"loss.teacher={shards}", "loss.distill_weight=1")
    assert "no such file; write it with" in str(run_distributed(run, 1, wrong)[0])
