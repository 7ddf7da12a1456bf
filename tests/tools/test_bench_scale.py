"""The benchmark of scaling: its cases, its arithmetic, and one run under each kind of start."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.render import section
from dist_vse.cli import main
from dist_vse.common import step_timer
from dist_vse.common.errors import UserError
from dist_vse.launch.environment import free_port
from dist_vse.tools.bench.scale_cases import Case, plan_cases, share
from dist_vse.tools.bench.scale_memory import measure_memory, memory_parts
from dist_vse.tools.bench.scale_rows import compare, compare_with_baseline, join
from tests.support.paths import ROOT

TINY = [
    "model.image.name=test_vit",
    "model.image.size=32",
    "model.text.width=64",
    "model.text.depth=1",
    "model.text.max_tokens=8",
    "model.embed_dim=16",
    "global_batch_size=16",
    "chunk_size=4",
]


def _said(case: Case) -> tuple[str, int, int, int]:
    return case.series, case.world_size, case.runs, case.config.global_batch_size


def test_one_thing_changes_at_a_time() -> None:
    vary = ["chunk_size=2,4", "loss.transport=ring"]
    cases = plan_cases(TINY, [1, 2, 4], vary, independent=True)
    assert list(map(_said, cases)) == [
        ("base", 1, 1, 16),
        ("strong", 2, 1, 16),
        ("weak", 2, 1, 32),
        ("independent", 1, 2, 16),
        ("strong", 4, 1, 16),
        ("weak", 4, 1, 64),
        ("independent", 1, 4, 16),
        ("chunk_size", 4, 1, 16),
        ("loss.transport", 4, 1, 16),
    ]
    assert (cases[7].config.chunk_size, cases[7].varied) == (2, "chunk_size=2")
    assert cases[8].config.loss.transport == "ring"
    shares = [share(cases, f"{i}/3") for i in range(3)]
    assert all(mine[0] is cases[0] for mine in shares)
    assert sorted(map(id, cases[1:])) == sorted(id(case) for mine in shares for case in mine[1:])


def _row(series: str, world_size: int, batch: int, rate: float, **more: Any) -> dict[str, Any]:
    row = {"series": series, "varied": "", "world_size": world_size, "runs": 1}
    row |= {"global_batch": batch, "pairs_per_s": rate, "seconds": {"encode": 2.0, "data": 0.0}}
    return row | {"memory_bytes": {"peak": 100}} | more


def test_efficiency_is_compared_with_the_right_row() -> None:
    rows = [
        _row("base", 1, 16, 10.0),
        _row("strong", 2, 16, 15.0),
        _row("weak", 2, 32, 18.0),
        _row("independent", 1, 16, 19.0, runs=2),
        _row("chunk_size", 2, 16, 30.0, varied="chunk_size=2"),
    ]
    compare(rows)
    assert [row["efficiency"] for row in rows] == [1.0, 0.75, 0.9, 0.95, 2.0]
    assert [row.get("of_independent") for row in rows] == [None, None, 18 / 19, None, None]
    seconds = {"encode": 1.0, "data": 5.0}
    faster = _row("strong", 2, 16, 30.0, seconds=seconds, memory_bytes={"peak": 50})
    compare_with_baseline([faster, _row("weak", 8, 128, 1.0)], rows)
    assert faster["of_baseline"] == {
        "pairs_per_s": 2.0,
        "peak_bytes": 0.5,
        "seconds": {"encode": 0.5},
    }
    with pytest.raises(UserError, match="no row of these settings"):
        compare_with_baseline([_row("base", 8, 16, 1.0)], rows)


def test_measurements_of_several_jobs_become_one() -> None:
    four = [_row("base", 4, 64, 35.0), _row("chunk_size", 4, 64, 36.0, varied="chunk_size=2")]
    two = [_row("base", 2, 16, 15.0)]
    rows = join([four, two, [_row("base", 1, 16, 10.0)], two])
    assert [(row["series"], row["world_size"]) for row in rows] == [
        ("base", 1),
        ("weak", 4),
        ("chunk_size", 4),
        ("strong", 2),
    ]


def test_memory_is_split_where_the_parts_begin() -> None:
    def step(_: torch.Tensor) -> None:
        step_timer.begin("encode")
        features = torch.zeros(100)
        graph = torch.zeros(50)
        torch.zeros(70)
        step_timer.begin("loss")
        with step_timer.collective():
            torch.zeros(1000)
        gradient = torch.zeros_like(features)
        step_timer.begin("second_pass")
        del graph
        torch.zeros(600)
        del gradient
        step_timer.begin(step_timer.OTHER)

    _, memory = measure_memory(lambda: torch.zeros(500), step)
    assert memory_parts(memory, inputs=300, outputs=400, gradients=7) == {
        "inputs": 300,
        "state": 2000 - 300,
        "features": 800,
        "encoders": 2400,
        "loss": 4000 - 400,  # the gradient takes its place
        "kept_graphs": 200,
        "gradients": 7,
        "peak": 2000 + 600 + 4000,
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One measurement on one and two processes, with the independent runs."""
    out = tmp_path_factory.mktemp("scale") / "scale.json"
    budget = ["--processes", "1", "2", "--rounds", "1", "--steps", "1"]
    vary = ["--vary", "loss.transport=ring"]
    page = ["--page", str(out.with_suffix(".html"))]
    assert main(["bench", "scale", *TINY, *budget, *vary, *page, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_a_measurement_can_be_rendered(measured: Path) -> None:
    report = json.loads(measured.read_text())
    assert report["command"].startswith("dist-vse bench scale ")
    text = section(report)
    assert "## scale" in text and text.count("| row |") == 3
    assert f"torch {torch.__version__.split('+')[0]}" in text


@pytest.mark.slow
def test_a_measurement_is_what_plans_are_checked_against(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware = str(ROOT / "configs/hardware/epyc_2cores.yaml")
    assert main(["plan", "--check", str(measured), "--hardware", hardware]) in (0, 1)
    assert "memory 4 of 4 rows" in capsys.readouterr().out


@pytest.mark.slow
def test_a_measurement_has_all_parts(measured: Path) -> None:
    report = json.loads(measured.read_text())
    rows = report["rows"]
    assert [row["series"] for row in rows] == [
        "base",
        "strong",
        "weak",
        "independent",
        "loss.transport",
    ]
    for row in rows:
        assert sum(row["seconds"].values()) == pytest.approx(row["step_seconds"], rel=0.05)
        memory = row["memory_bytes"]
        stands = memory["state"] + memory["inputs"] + memory["features"]
        largest = max(memory["encoders"], memory["loss"] + memory["kept_graphs"])
        assert memory["peak"] == stands + largest
        assert memory["gradients"] == 4 * (row["parameters"] - 1)  # SigLIP's bias is not learned
    parameters = 4 * rows[0]["parameters"]
    single, strong, weak, _, ring = rows
    assert single["sent_bytes"] == {} and "of_independent" in weak
    assert parameters * 0.99 < strong["sent_bytes"]["reduce"] < parameters * 1.01
    features = 16 * 16 * 4
    for row, factor in ((strong, 1), (weak, 2), (ring, 2)):
        assert factor * features <= row["sent_bytes"]["gather"] < factor * features + 2048
    assert single["memory_bytes"]["inputs"] == 16 * (3 * 32 * 32 + 8 * 8)
    assert report["versions"]["torch"] and report["machine"]["cores"]
    page = measured.with_suffix(".html").read_text()
    assert page.count("<figure") == 3 and "weak: 2 processes, 32" in page


@pytest.mark.slow
def test_a_baseline_gives_ratios(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["bench", "scale", "--read", str(measured), "--baseline", str(measured)]
    assert main(again) == 0
    said = capsys.readouterr().out
    assert re.search(r"weak: 2 processes, 32 .*1\.000 .*1\.000", said), said


@pytest.mark.slow
def test_torchruns_processes_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=2"]
    torchrun += [f"--master_port={free_port()}", "-m", "dist_vse.cli", "bench", "scale"]
    budget = ["--rounds", "1", "--steps", "1", "--out", str(out)]
    done = subprocess.run(
        [*torchrun, *TINY, *budget],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["series"], row["world_size"], row["global_batch"]) == ("base", 2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2", "1"], "must be rising numbers"),
        (["--processes", "3"], r"global_batch_size \(16\) must be a multiple of"),
        (["--vary", "chunk_size"], "write key=value,value"),
        (["--vary", "chunk=2"], "unknown key 'chunk'"),
        (["--rounds", "0"], r"--rounds \(0\) must be at least 1"),
        (["--task", "3/3"], "write i/n"),
        (["--out", "/dev/null/scale.json"], r"/dev/null/scale\.json: can't be written"),
        (["--read", "/dev/null"], "/dev/null: can't be read"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "scale", *TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error
