"""A hardware file from doctor's figures, and the rates of a precision."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from dist_vse.common.errors import UserError
from dist_vse.tools.plan import cli
from dist_vse.tools.plan.doctor_figures import hardware_of_gpu, read_figures
from dist_vse.tools.plan.hardware import Hardware, load_hardware
from tests.support.paths import ROOT

CEILINGS = {
    "device": "NVIDIA H100 80GB HBM3",
    "fp32_tflops": 51.0,
    "tf32_tflops": 403.0,
    "bf16_tflops": 745.0,
    "conv_fp32_tflops": 40.0,
    "copy_gb_per_s": 2970.0,
    "launch_us": 5.0,
    "optimizer_ns": 0.02,
    "process_gib": 0.5,
    "memory_gib": 79.1,
}
LINK = {"alpha_us": 20.0, "copy_gb_per_s": 300.0, "reduce_gb_per_s": 310.0, "pair_gb_per_s": 280.0}


def _report(path: Path, gpus: int, **checks: dict[str, Any]) -> Path:
    rows = [{"number": int(name[1:]), "figures": found} for name, found in checks.items()]
    path.write_text(json.dumps({"doctor_gpu": 1, "gpus": gpus, "checks": rows}))
    return path


def test_calibrate_writes_what_doctor_measured(tmp_path: Path) -> None:
    report = _report(tmp_path / "gpu.json", 8, c2=CEILINGS, c4={"ranks": 8, **LINK})
    out = tmp_path / "here.yaml"
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    arguments = ["--calibrate", str(out), "--from-doctor", str(report)]
    assert cli.run(parser.parse_args(arguments)) == 0
    found = load_hardware(str(out))
    assert (found.ranks_per_node, found.cores, found.checked) == (8, 0, "")
    assert found.rates("fp32") == (51.0, 40.0)
    assert found.rates("tf32") == (403.0, 403.0)
    assert found.rates("bf16") == found.rates("fp16") == (745.0, 745.0)
    assert found.inside.copy_gb_per_s == 300.0
    assert found.between == load_hardware(cli.HARDWARE).between


def test_one_gpu_has_no_links_of_its_own(tmp_path: Path) -> None:
    checked = {"time_error": -0.1, "memory_error": 0.02}
    report = _report(tmp_path / "gpu.json", 1, c2=CEILINGS, c12=checked)
    found = hardware_of_gpu(*read_figures(report)[:1], Hardware())
    assert found.inside == Hardware().inside
    assert found.checked == "doctor's step: the plan's time is off by -10%, its memory by +2%"


def test_a_report_without_ceilings_is_refused(tmp_path: Path) -> None:
    for path in (_report(tmp_path / "a.json", 1, c2={}), _report(tmp_path / "b.json", 1)):
        with pytest.raises(UserError, match=r"check 2 is missing or failed \(no fp32_tflops\)"):
            read_figures(path)
    (tmp_path / "c.json").write_text("[]")
    for name in ("c.json", "none.json"):
        with pytest.raises(UserError, match="no JSON of `dist-vse doctor --gpu --json`"):
            read_figures(tmp_path / name)


@pytest.mark.parametrize("name", ["a100_80g", "h100_80g"])
def test_float32_convolutions_count_without_tf32(name: str) -> None:
    found = load_hardware(str(ROOT / "configs" / "hardware" / f"{name}.yaml"))
    products, convolutions = found.rates("fp32")
    assert products == convolutions < found.rates("tf32")[1] < found.rates("bf16")[0]
    assert not found.checked
