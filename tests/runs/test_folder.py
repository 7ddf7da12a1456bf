"""The config in a run's folder: what a later start may change, and what it is told."""

import shutil
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.config import TrainConfig, load_config
from dist_vse.data.index import read_index
from dist_vse.runs.environment import record_environment, shards_state, verify_shards
from dist_vse.runs.folder import prepare_run_dir
from tests.support.datasets import write_dataset


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


def test_what_changes_the_learning_is_refused_or_allowed_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _start(tmp_path, "optim.lr=0.1", "loss.temperature=0.1")
    changed = ["optim.lr=0.2", "loss.temperature=0.3", "log_every=1"]
    with pytest.raises(UserError, match=r"resume\.allow=\[loss\.temperature,optim\.lr\]"):
        _start(tmp_path, *changed)
    with pytest.raises(UserError, match=r"\(loss\.temperature: 0\.1 -> 0\.3\)"):
        _start(tmp_path, *changed, "resume.allow=[optim]")
    with pytest.raises(UserError, match=r"resume\.allow='optim\.lrr' is unknown; .* 'optim\.lr'"):
        _start(tmp_path, *changed, "resume.allow=[optim.lrr]")
    assert not caplog.messages
    _start(tmp_path, *changed, "resume.allow=[optim,loss.temperature]")
    assert [m.split(" with ")[1] for m in caplog.messages] == [
        "loss.temperature: 0.1 -> 0.3",
        "optim.lr: 0.1 -> 0.2",
    ]
    _start(tmp_path, *changed)  # now it is what the run has


def test_other_data_may_be_allowed(tmp_path: Path) -> None:
    record_environment(tmp_path, 0, {"/a": "aaaa"})
    with pytest.raises(UserError, match=r"or continue with resume\.allow=\[data\]"):
        record_environment(tmp_path, 5, {"/a": "bbbb"})
    record_environment(tmp_path, 5, {"/a": "bbbb"}, allow=["data"])
    record_environment(tmp_path, 6, {"/a": "bbbb"})


def test_a_shard_that_changed_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = write_dataset(tmp_path / "data", {"train": [3, 3]})

    def start(step: int) -> None:
        state = {str(index.root): shards_state(index)}
        record_environment(tmp_path, step, {str(index.root): index.fingerprint()}, shards=state)

    start(0)
    start(5)
    verify_shards(index)
    index = read_index(index.root.rename(tmp_path / "moved"))
    start(5)
    assert not caplog.messages
    index = read_index(shutil.copytree(index.root, tmp_path / "copy", copy_function=shutil.copy))
    start(5)
    (said,) = caplog.messages  # a copy has other times
    assert said.startswith(f"{tmp_path / 'copy'}: shards have other sizes or times")
    caplog.clear()
    path = index.root / "train-00001.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    start(6)
    (said,) = caplog.messages
    assert "shards have other sizes or times" in said and "resume.verify_shards=true" in said
    with pytest.raises(UserError, match=r"train-00001\.tar: the bytes are not those of the index"):
        verify_shards(read_index(index.root))
