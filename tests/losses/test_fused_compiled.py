"""The fused kernels compiled ahead for GPUs that are not here: sm_80 (A100) and sm_90 (H100).

In a process of its own, for the other tests run them in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: the fused kernels are NOT compiled")
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a program may have
KERNELS = 8


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_no_register_is_spilled_and_shared_memory_suffices(
    capability: int, dtype: str, tmp_path: Path
) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_ahead", str(capability), dtype],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if run.returncode == 3:
        pytest.skip(f"NOT compiled for sm_{capability}: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    programs = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(programs) == KERNELS
    for program in programs:
        assert program["stack"] == 0, program
        assert program["shared"] <= SHARED_BYTES[capability], program
