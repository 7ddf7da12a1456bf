"""The config in a run's folder: what a later start may change, and what it is told."""

from pathlib import Path

import pytest

from dist_vse.config import TrainConfig, load_config
from dist_vse.runs.folder import prepare_run_dir


def _start(run_dir: Path, *overrides: str) -> TrainConfig:
    config = load_config(None, [f"output_dir={run_dir}", *overrides])
    prepare_run_dir(config)
    (run_dir / "metrics.jsonl").touch()
    return config


@pytest.mark.parametrize(
    ("schedule", "told"), [("cosine", True), ("step", True), ("constant", False)]
)
def test_another_end_of_the_schedule_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, schedule: str, told: bool
) -> None:
    _start(tmp_path, f"optim.schedule={schedule}", "total_steps=4")
    _start(tmp_path, f"optim.schedule={schedule}", "total_steps=4")
    assert not caplog.messages
    _start(tmp_path, f"optim.schedule={schedule}", "total_steps=8")
    assert bool(caplog.messages) is told
    assert all("total_steps: 4 -> 8: the learning rate now runs" in m for m in caplog.messages)
