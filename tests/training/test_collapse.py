"""The warning of nearly equal features comes where it is true, with advice for the loss at hand."""

import pytest

from dist_vse.config import LossConfig
from dist_vse.losses.registry import LOSSES
from dist_vse.training.collapse import CollapseWatch

EQUAL = {"positive_similarity": 0.99, "hardest_similarity": 0.99, "uniformity": -0.01}
SPREAD = {"positive_similarity": 0.5, "hardest_similarity": 0.3, "uniformity": -2.0}


@pytest.mark.parametrize("name", LOSSES)
def test_a_fresh_model_is_no_news_and_advice_names_what_the_loss_reads(name: str) -> None:
    watch = CollapseWatch(LossConfig(name=name), 1000)
    assert watch.look(EQUAL, 20) is None
    warning = watch.look(EQUAL, 100)
    assert warning is not None and warning.startswith("the features have not spread yet")
    assert ("loss.warmup_samples" in warning) == (name in ("convse++", "vse++"))
    assert "optim.lr" in warning and "\n" not in warning
    assert watch.look(EQUAL, 200) is None  # once
    assert watch.look(SPREAD, 300) is None
    warning = watch.look(EQUAL, 400)
    assert warning is not None and warning.startswith("the features have collapsed")
    assert "lower optim.lr" in warning


def test_a_collapse_is_told_at_once_and_a_warm_up_is_waited_for() -> None:
    watch = CollapseWatch(LossConfig(), 1000)
    assert watch.look(SPREAD, 10) is None
    assert "have collapsed" in str(watch.look(EQUAL, 20))
    watch = CollapseWatch(LossConfig(name="vse++", warmup_samples=500), 1000)
    assert watch.look(EQUAL, 400) is None
    assert "raise loss.warmup_samples (500)" in str(watch.look(EQUAL, 500))
    assert CollapseWatch(LossConfig(), 10).look(SPREAD | {"uniformity": -0.2}, 10) is None
