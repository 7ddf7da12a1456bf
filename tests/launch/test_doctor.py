"""`dist-vse doctor`: one broken thing for each message."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_vse.common.errors import UserError
from dist_vse.launch import check_job, rank_check
from dist_vse.launch.cluster import ClusterConfig
from dist_vse.launch.doctor import doctor
from dist_vse.launch.status import job_state
from tests.support.datasets import write_dataset
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

CONFIG = str(ROOT / "configs" / "debug_cpu.yaml")
Examine = Callable[..., tuple[int, dict[str, str]]]


@pytest.fixture
def examine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Examine:
    """Return doctor's exit code and its lines, by the check."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(
        *overrides: str, cluster: str = "", timeout_s: float = 60
    ) -> tuple[int, dict[str, str]]:
        path = tmp_path / "cluster.yaml"
        local = "scheduler: local, processes_per_node: 2, env: {DS_ACCELERATOR: cpu}"
        path.write_text(f"{{{local}{cluster}}}")
        given = [f"data.index={tmp_path}/data", f"output_dir={tmp_path}/run", *overrides]
        code = doctor(CONFIG, given, str(path), timeout_s)
        lines = [
            line for line in capsys.readouterr().out.splitlines() if line[:4] in ("ok  ", "FAIL")
        ]
        return code, {line[6:].split(":")[0]: line for line in lines}

    write_dataset(tmp_path / "data", {"train": [40, 24], "val": [16]})
    return run


@pytest.mark.slow
def test_a_run_that_can_start(examine: Examine, tmp_path: Path) -> None:
    code, lines = examine()
    assert code == 0, lines
    assert list(lines) == ["batch", "shards", "samples", "memory", "disk", "ranks"]
    assert "64 samples, the first 8 can be read" in lines["samples"]
    assert "2 communicate, have fp32 and the memory (" in lines["ranks"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cluster.yaml", "data"]


def test_ranks_look_at_precision_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for bf16 in (False, True):
        rank_check._check_precision(cpu, bf16=bf16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    rank_check._check_memory(cpu, 0.1)
    with pytest.raises(UserError, match=r"a rank needs 1000000.00 GiB in a step.*zero_stage"):
        rank_check._check_memory(cpu, 1e6)


def test_ranks_look_at_the_files(tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    shard.write_bytes(b"x")
    rank_check._check_files(str(shard), tmp_path)
    for path, folder in ((tmp_path / "none.tar", tmp_path), (shard, tmp_path / "none")):
        with pytest.raises(UserError, match=r"/none.*visible on every node"):
            rank_check._check_files(str(path), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["shard.tar"]


def test_the_ranks_job_is_short_and_ended(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_vse.launch import doctor as module

    cluster = ClusterConfig(time_min=1440, signal_before_end_s=600, failures=2)
    short = check_job.short_cluster(cluster)
    assert (short.time_min, short.requeue, short.failures) == (10, False, 0)
    assert check_job.short_cluster(ClusterConfig(time_min=7, signal_before_end_s=9)).time_min == 7

    started, start = [], check_job.start
    monkeypatch.setattr(
        check_job, "start", lambda *args: started.append(start(*args)) or started[-1]
    )
    monkeypatch.setattr(module, "_CHECKS", {"ranks": module._ranks})
    quick = rank_check.RankCheck(bf16=False, needed_gib=0.0, shard=None, folder=str(tmp_path))
    monkeypatch.setattr(module, "_rank_check", lambda *_: quick)
    code, lines = examine(timeout_s=0.3)
    assert code == 2 and "is still RUNNING after 0 s; raise --timeout" in lines["ranks"]
    wait_until(lambda: job_state(started[0]).ended, "the end of the ranks' job", 20)


@pytest.mark.slow
def test_memory_is_that_of_a_whole_step(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_vse.launch import doctor as module

    monkeypatch.setattr(module, "_CHECKS", {"memory": module._memory})
    chunks = ("global_batch_size=32768", "chunk_size=16384")
    code, lines = examine(*chunks, cluster=", mem_gib: 1")
    assert code == 2 and "but mem_gib is 1; ask for more, lower chunk_size" in lines["memory"]
    whole, states, *_ = map(float, re.findall(r"\d+\.\d+", lines["memory"]))
    assert whole > 1 > states  # what makes it too much are the activations


def test_what_is_broken_is_named(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_vse.launch import doctor as module

    fast = ("batch", "shards", "samples", "disk")
    monkeypatch.setattr(module, "_CHECKS", {name: module._CHECKS[name] for name in fast})
    code, lines = examine("global_batch_size=36")
    assert code == 2 and "nearest: 32, 40" in lines["batch"]
    _, lines = examine("global_batch_size=128")
    assert "64 samples, fewer than global_batch_size (128)" in lines["samples"]
    _, lines = examine("keep_checkpoints=100000000")
    assert lines["disk"].startswith("FAIL") and "lower keep_checkpoints" in lines["disk"]
    code, lines = examine("output_dir=/proc/run", "data.index=/nowhere")
    assert code == 2 and "/proc: can't be written to (" in lines["disk"]
    assert "/nowhere/index.json: no such index" in lines["shards"]
    assert lines["samples"] == "FAIL  samples: same error as shards"
    shard = tmp_path / "data" / "train-00001.tar"
    index = tmp_path / "data" / "index.json"
    local = index.read_text()
    index.write_text(local.replace('"train-00001.tar"', f'"pipe:cat {shard}"'))
    _, lines = examine()
    assert "allow that with --allow-pipe, in training with data.allow_pipe=true" in lines["shards"]
    _, lines = examine("data.allow_pipe=true")
    assert lines["shards"].endswith("2 shards match their index; 1 at URLs were not checked")
    index.write_text(local)
    whole = shard.read_bytes()
    shard.write_bytes(bytes(len(whole)))
    _, lines = examine()
    assert "its samples are not where the index says; run `dist-vse shard verify" in lines["shards"]
    shard.write_bytes(whole[:-1])
    _, lines = examine()
    assert lines["shards"].startswith("FAIL") and "copy it again" in lines["shards"]
    shard.unlink()
    _, lines = examine()
    assert ": missing; shard" in lines["shards"]
