"""One entry a loss: ours, and losses registered from outside the package."""

import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.losses import registry
from dist_vse.losses.registry import LOSSES, _imported, check_name, find_loss, loss_label
from dist_vse.tools.bench.traffic import bytes_sent
from dist_vse.tools.plan.settings import Settings
from dist_vse.tools.plan.traffic import loss_collectives, sent_bytes
from dist_vse.tools.report.page import write_report
from dist_vse.tools.verify.checks import check
from tests.support.distributed import run_distributed
from tests.support.loss_cases import Case, dense_loss, error, global_loss, gradients
from tests.support.runs import read_logged, read_losses, trained_run

TOY = "tests.support.toy_loss:TOY"


@pytest.mark.parametrize("name", LOSSES)
def test_every_entry_is_whole(name: str) -> None:
    spec = find_loss(name)
    assert spec.name == name and spec.label and spec.paper.startswith("https://")
    assert all(callable(_imported(x)) for x in (spec.dense, spec.terms))
    assert loss_collectives(Settings(64, 2, 8, loss=name), 16)


ROWS, WIDTH = 256, 4  # narrow features, so that a number a pair counts


def _bytes_of_losses() -> dict[tuple[str, str], float]:
    """Return what a rank sends for each loss, forward and backward, with both kinds of ids."""
    found, own = {}, slice(distributed.rank() * ROWS, (distributed.rank() + 1) * ROWS)
    for name, transport in itertools.product(LOSSES, ("gather", "ring")):
        case = Case(name, 2 * ROWS, width=WIDTH)
        case.part = own
        run = partial(gradients, global_loss, case, dtype=torch.float32, transport=transport)
        found[name, transport] = bytes_sent(run)
    return found


def test_the_plan_counts_what_every_loss_sends() -> None:
    for (name, transport), sent in run_distributed(_bytes_of_losses, 2)[0].items():
        settings = Settings(2 * ROWS, 2, ROWS, loss=name, transport=transport)
        planned = sent_bytes(loss_collectives(settings, WIDTH), 2)
        assert sent == pytest.approx(planned, rel=0.01), (name, transport)


def test_the_registry_imports_no_torch() -> None:
    code = (
        "import sys, dist_vse.losses.registry, dist_vse.config; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip", "did you mean 'info_nce'"),
        ("NT-Xent", "did you mean 'info_nce'"),
        ("convse+", r"loss='convse\+' is unknown; did you mean 'convse"),
        ("my_losses:MINE", r"can't be imported \(No module named 'my_losses'\); put its module's"),
        ("tests.support.toy_loss:NONE", "can't be imported .*NONE"),
        ("tests.support.toy_loss:dense", "is a function, not a LossSpec"),
    ],
)
def test_a_loss_that_is_none_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_loss(name)


def test_a_config_may_name_a_loss_from_outside_without_importing_it() -> None:
    check_name("nowhere:MINE")
    assert loss_label("nowhere:MINE") == "nowhere:MINE" and loss_label("dcl") == "DCL"
    assert load_config(None, ["loss.name=nowhere:MINE"]).loss.name == "nowhere:MINE"


def _errors() -> dict[str, float]:
    found, counts = {}, (7, 3)
    for transport, duplicates, tile in itertools.product(
        ("gather", "ring"), ("mask", "positive"), (3, 64)
    ):
        case = Case(TOY, sum(counts), duplicates=duplicates, groups=8)
        exact = gradients(dense_loss, case)
        start = sum(counts[: distributed.rank()])
        case.part = slice(start, start + counts[distributed.rank()])
        grads = gradients(global_loss, case, transport=transport, tile=tile)
        features = [distributed.all_gather_rows(x) / 2 for x in grads[1:3]]
        found[f"{transport} {duplicates} {tile}"] = error([grads[0], *features], exact[:3])
    return found


def test_a_loss_from_outside_equals_its_dense_form_on_ragged_ranks() -> None:
    for errors in run_distributed(_errors, 2):
        assert max(errors.values()) < 1e-10, errors


@pytest.mark.slow
def test_a_loss_from_outside_is_trained_reported_and_verified(tmp_path: Path) -> None:
    more = (f"loss.name={TOY}", "total_steps=6", "log_every=1", "engine.zero_stage=2")
    run_dir = trained_run(tmp_path, {"train": 64, "val": 8}, *more)
    losses = read_losses(run_dir)
    assert losses[-1] < losses[0]
    assert all(-1 <= x <= 1 for x in read_logged(run_dir, "hardest_similarity"))  # telemetry
    out = tmp_path / "report.html"
    write_report(run_dir, None, out)
    assert TOY in out.read_text()
    assert run_distributed(_verified, 2) == [0, 0]


def _verified() -> int:
    stages = [f"engine.zero_stage={stage}" for stage in range(4)]
    return max(check(load_config(None, [f"loss.name={TOY}", stage])).code for stage in stages)


def test_an_installed_package_may_register_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entry_points", lambda: {"toy_squared": TOY})
    assert find_loss("toy_squared").label == "Squared error"
    assert load_config(None, ["loss.name=toy_squared"]).loss.name == "toy_squared"
    with pytest.raises(UserError, match="did you mean 'toy_squared'"):
        check_name("toy_square")
