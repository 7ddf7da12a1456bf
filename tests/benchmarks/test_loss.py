"""The benchmark of the losses runs, and its numbers hang together."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.support import loss_on_gpu
from dist_vse.tools.bench import rank_loss
from dist_vse.tools.verify.peer import peer_version


@pytest.mark.slow
def test_bench_loss_writes_times_traffic_errors_and_memory(tmp_path: Path) -> None:
    out = tmp_path / "loss.json"
    arguments = [
        "loss",
        "--rows",
        "96",
        "--dim",
        "16",
        "--repeats",
        "1",
        "--memory",
        "512",
        "--memory-dim",
        "8",
    ]
    assert main([*arguments, "--out", str(out)]) == 0
    report = json.loads(out.read_text())["figures"]
    (speed,) = report["speed"]
    assert speed["global_batch"] == 192
    assert all(seconds > 0 for seconds in speed["seconds"].values())
    features = 192 * 16 * 4  # gathered (half of it is sent), and as much for the gradients
    for case in ("convse", "convse, S kept", "convse++"):
        assert features < speed["sent_bytes"][case] <= features + 4 * 192 * 4
        assert speed["error"][case] < 1e-5
    for case in ("convse, bf16", "convse, bfloat16 features", "convse, float16 features"):
        assert 1e-5 < speed["error"][case] < 1e-1
    if peer_version() is not None:
        assert speed["sent_bytes"]["OpenCLIP"] == pytest.approx(2 * features)
    for entry in report["memory"]:
        assert entry["peak_bytes"] >= 0  # so small a batch may fit in what the process has already
        if entry["loss"] != "OpenCLIP":
            assert 0 < entry["own_bytes"] < 1.1 * 2**20  # two tiles of 256 x 512, and vectors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], r"--rows \(0\) must be at least 1"),
        (["--processes", "0"], r"--processes \(0\) must be at least 1"),
        (["--repeats", "0"], r"--repeats \(0\) must be at least 1"),
        (["--rows", "--memory", "1001"], r"multiple of --processes \(2\); nearest: 1000"),
        (["--rows", "8", "--out", "/"], r"/: can't be written .*it is a folder"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["loss", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loss", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device cuda needs a GPU") and error.count("\n") == 1


@pytest.mark.slow
def test_the_gpus_table_is_made_of_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = {"convse, tiled": rank_loss._ours("convse", "tiled")}
    monkeypatch.setattr(rank_loss, "our_losses", lambda: fast)
    result = loss_on_gpu.measure([24], 16, 1, torch.device("cpu"))
    (found,) = result.figures["losses"]
    assert found["global_batch"] == 24 * 8
    rows = {row[0]: row for row in result.tables[0].rows}
    assert {"convse, tiled", rank_loss.BARE} <= set(rows)
    if peer_version() is not None:
        assert rows["OpenCLIP, autocast"][5] == "1.00"
    assert all("error" not in one for one in found.values() if isinstance(one, dict)), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_benchmark_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "loss.json"
    assert main(["loss", "--device", "cuda", "--rows", "1024", "--out", str(out)]) == 0
    (found,) = json.loads(out.read_text())["figures"]["losses"]
    assert found["convse, fused"]["kernels"] > 0
