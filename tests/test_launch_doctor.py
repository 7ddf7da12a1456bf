"""`dist-vse doctor`: one broken thing for each message."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_vse.errors import UserError
from launch import probe
from launch.doctor import doctor
from tests.datasets import write_dataset

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "debug_cpu.yaml")
Examine = Callable[..., tuple[int, dict[str, str]]]


@pytest.fixture
def examine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Examine:
    """Return doctor's exit code and its lines, by the check."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*overrides: str, cluster: str = "") -> tuple[int, dict[str, str]]:
        path = tmp_path / "cluster.yaml"
        local = "scheduler: local, processes_per_node: 2, env: {DS_ACCELERATOR: cpu}"
        path.write_text(f"{{{local}{cluster}}}")
        given = [f"data.index={tmp_path}/data", f"output_dir={tmp_path}/run", *overrides]
        code = doctor(CONFIG, given, str(path), 60)
        lines = [
            line for line in capsys.readouterr().out.splitlines() if line[:4] in ("ok  ", "FAIL")
        ]
        return code, {line[6:].split(":")[0]: line for line in lines}

    write_dataset(tmp_path / "data", {"train": [40, 24], "val": [16]})
    return run


def test_a_run_that_can_start(examine: Examine, tmp_path: Path) -> None:
    code, lines = examine()
    assert code == 0, lines
    assert list(lines) == ["batch", "shards", "samples", "memory", "disk", "ranks"]
    assert "64 samples, the first 8 can be read" in lines["samples"]
    assert "2 met in" in lines["ranks"] and "have fp32 and the memory" in lines["ranks"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cluster.yaml", "data"]


def test_ranks_look_at_precision_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for bf16 in (False, True):
        probe._check_precision(cpu, bf16=bf16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    probe._check_memory(cpu, 0.1)
    with pytest.raises(UserError, match=r"a rank needs 1000000.00 GiB for weights.*zero_stage"):
        probe._check_memory(cpu, 1e6)


def test_what_is_broken_is_named(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import doctor as module

    fast = {name: check for name, check in module._CHECKS.items() if name != "ranks"}
    monkeypatch.setattr(module, "_CHECKS", fast)
    code, lines = examine("global_batch_size=36")
    assert code == 2 and "nearest: 32, 40" in lines["batch"]
    _, lines = examine("global_batch_size=128")
    assert "64 samples, fewer than global_batch_size (128)" in lines["samples"]
    _, lines = examine("keep_checkpoints=100000000")
    assert lines["disk"].startswith("FAIL") and "lower keep_checkpoints" in lines["disk"]
    _, lines = examine("model.text.width=4096", cluster=", mem_gib: 1")
    assert lines["memory"].startswith("FAIL") and "but mem_gib is 1" in lines["memory"]
    code, lines = examine("output_dir=/proc/run", "data.index=/nowhere")
    assert code == 2 and "/proc: can't be written to (" in lines["disk"]
    assert "/nowhere/index.json: no such index" in lines["shards"]
    assert lines["samples"] == "FAIL  samples: as shards"
    shard = tmp_path / "data" / "train-00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(bytes(len(whole)))
    _, lines = examine()
    assert "its samples are not where the index says; `dist-vse shard verify" in lines["shards"]
    shard.write_bytes(whole[:-1])
    _, lines = examine()
    assert lines["shards"].startswith("FAIL") and "copy it again" in lines["shards"]
    shard.unlink()
    _, lines = examine()
    assert "is missing" in lines["shards"]
