"""`dist-vse doctor --gpu`: its checks on a CPU, and on GPUs under `pytest -m gpu`."""

import contextlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dist_vse.common.errors import UserError
from dist_vse.launch.gpu_checks import command, encoders, steps
from dist_vse.launch.gpu_checks.catalog import ALL, CHECKS
from dist_vse.launch.gpu_checks.child import load
from dist_vse.launch.gpu_checks.command import (
    FAIL,
    OK,
    SKIPPED,
    Options,
    check_gpus,
    explain,
    find_place,
    read_numbers,
    run_check,
)
from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.launch.gpu_checks.processes import Ended, Place, run_ranks
from dist_vse.training import grad_cache
from dist_vse.training.replay_check import Replay
from tests.support.distributed import run_distributed
from tests.support.paths import ROOT

CPU = Place(gpus=0, ranks=2)
ON_ONE = (1, 5, 6, 8, 9, 11, 12, 14)  # what one process checks on a CPU


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.gpu
@pytest.mark.timeout(650)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("number", CHECKS)
def test_a_check_on_gpus(number: int) -> None:
    row = run_check(number, find_place("cuda", None), Options(limit_s=120))
    assert row.status != FAIL, (row.words, row.figures)


def _run(numbers: list[int], folder: str) -> dict[int, Finding]:
    """Make checks one after another in this rank, each in a folder of its own."""
    found = {}
    for number in numbers:
        own = Path(folder, str(number))
        own.mkdir(exist_ok=True)
        task = Task(number, on_gpu=False, folder=str(own), ends=time.monotonic() + 60)
        found[number] = load(CHECKS[number].function)(task)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", ON_ONE)
def test_a_check_on_a_cpu(number: int, tmp_path: Path) -> None:
    if number == 14:
        pytest.importorskip("triton", reason="Triton is not installed: check 14 is NOT tried")
    if number == 8:  # it pretends a group of its own
        (found,) = (_run([8], str(tmp_path)),)
    else:
        (found,) = run_distributed(_run, 1, [number], str(tmp_path), timeout=110)
    assert found[number].ok, found[number]
    json.dumps(found[number].figures)


@pytest.mark.slow
def test_the_checks_of_several_ranks_on_a_cpu(tmp_path: Path) -> None:
    numbers = [n for n, check in CHECKS.items() if check.group == ALL and not check.gpus]
    first, _ = run_distributed(_run, 2, numbers, str(tmp_path), timeout=110)
    assert list(first) == [3, 7]
    for finding in first.values():
        assert finding.ok, finding


@pytest.mark.slow
def test_the_command_reports_every_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    options = Options(checks=[1, 4, 10, 13], device="cpu", json=path, limit_s=100)
    assert check_gpus(options) == 0
    report = json.loads(path.read_text())
    rows = {row["number"]: row for row in report["checks"]}
    assert {n: row["status"] for n, row in rows.items()} == {1: OK, 4: SKIPPED, 10: SKIPPED, 13: OK}
    assert rows[10]["words"] == "needs a GPU" and rows[4]["words"] == "needs 2 GPUs"
    assert rows[1]["figures"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["ok", "1"],
        ["skipped", "4"],
        ["skipped", "10"],
        ["ok", "13"],
    ]


def test_a_check_that_hangs_or_dies_is_a_row(tmp_path: Path) -> None:
    hang = ["-c", "import threading; threading.Event().wait()"]
    ended = run_ranks(hang, 2, CPU, tmp_path, limit_s=0.4)
    assert [one.code for one in ended] == [None, None]
    assert explain(ended, 0.4) == "no end after 0.4 s (ranks 0, 1); --limit gives it longer"
    one_dies = "os.environ['RANK'] == '1' and 1 / 0; threading.Event().wait()"
    dies = ["-c", f"import os, threading; {one_dies}"]
    ended = run_ranks(dies, 2, CPU, tmp_path, limit_s=60, grace_s=0.1)
    assert [one.code for one in ended] == [None, 1]
    assert ended[0].seconds < 60, "the other rank was waited for"
    assert explain(ended, 60) == "rank 1 ended with code 1: ZeroDivisionError: division by zero"


def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    worker = "import os, threading; print(os.getpid(), flush=True); threading.Event().wait()"
    start = f"subprocess.Popen([sys.executable, '-c', {worker!r}], stdout=subprocess.PIPE)"
    code = f"import os, subprocess, sys; print(int({start}.stdout.readline())); os._exit(0)"
    (ended,) = run_ranks(["-c", code], None, CPU, tmp_path, limit_s=20)
    assert ended.code == 0
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(ended.log)).wait(timeout=10)


def test_ranks_that_share_a_gpu_are_hosts_of_their_own_to_nccl() -> None:
    alone, shared = Place(2, 2).environment(1, 2), Place(1, 2).environment(1, 2)
    assert alone == {"DS_ACCELERATOR": "cuda", "TRITON_INTERPRET": "0"}
    assert shared["LOCAL_RANK"] == "0" and shared["LOCAL_WORLD_SIZE"] == "1"
    assert shared["NCCL_HOSTID"] != Place(1, 2).environment(0, 2)["NCCL_HOSTID"]


@pytest.mark.parametrize("text", ["0", "15", "1,x", "", "-1"])
def test_numbers_that_are_no_checks(text: str) -> None:
    with pytest.raises(UserError, match=r"--checks .*: give numbers from 1 to 14"):
        read_numbers(text)
    assert read_numbers("7, 1,7") == [1, 7]


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UserError, match=r"--ranks \(9\) must be from 1 to 8"):
        find_place("cpu", 9)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: PyTorch sees no GPU"):
            find_place("cuda", None)
        assert find_place("auto", None) == CPU


def test_a_finding_of_a_fault_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> list[Ended]:
        return [Ended(1, 1.0, "Traceback\nValueError: no\n")]

    monkeypatch.setattr(command, "run_ranks", run)
    row = run_check(6, CPU, Options())
    assert (row.status, row.words) == (FAIL, "rank 0 ended with code 1: ValueError: no")


def test_what_compiles_first_is_not_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[bool, float]] = []

    def run(task: Task, place: Place, limit_s: float) -> Finding:
        ran.append((task.warm_up, limit_s))
        assert task.warm_up or task.warmed == ({} if place == CPU else {"a": 1})
        return Finding(not task.warm_up or not fails, "the compiler died", {"a": 1})

    monkeypatch.setattr(command, "_run", run)
    fails = False
    row = run_check(14, Place(1, 2), Options())
    assert ran == [(True, 240), (False, 60)] and row.status == OK and "warm_up_s" in row.figures
    fails = True
    row = run_check(14, Place(1, 2), Options())
    assert (row.status, row.words) == (
        FAIL,
        "while compiling, before the check: the compiler died",
    )
    assert len(ran) == 3
    run_check(14, CPU, Options())
    assert len(ran) == 4, "a CPU compiles nothing"


def test_times_of_a_shared_gpu_are_not_measured() -> None:
    assert run_check(4, Place(gpus=2, ranks=3), Options()).status == SKIPPED


def test_only_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_mode(mode: str) -> None:
        if mode == "warn":
            warnings.warn("a feature that does not yet detect all synchronizing", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with steps._watched() as found:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert found.total() == 1


def test_every_warm_up_is_there() -> None:
    for check in CHECKS.values():
        if check.warm_up:
            assert callable(load(check.warm_up))


# Faults that the checks must find.
def _task(folder: Path) -> Task:
    return Task(5, on_gpu=False, folder=str(folder), ends=time.monotonic() + 60)


def test_a_second_pass_with_other_draws_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = encoders._config("gru", 0.3)
    assert encoders._gradient_error(config) < encoders.GRADIENT_CLOSE["fp32"]
    monkeypatch.setattr(grad_cache, "replay", lambda state: contextlib.nullcontext())
    assert encoders._gradient_error(config) > 3 * encoders.GRADIENT_CLOSE["bf16"]


def test_float16_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    half = Replay(0.0, None, "model.text.trunk.gru (GRU)")
    monkeypatch.setattr(encoders, "compare_passes", lambda *_, **__: half)
    found = encoders.check_dtypes(_task(tmp_path))
    assert not found.ok and "model.text.trunk.gru (GRU) runs in float16" in found.words


def test_gradients_that_vanish_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shares = {"fp32": 0.0, "bf16": 0.27}  # as in float16 on an H100
    monkeypatch.setattr(encoders, "_zero_share", lambda config, precision, size: shares[precision])
    monkeypatch.setattr(encoders, "compare_passes", lambda *_, **__: Replay(0.0, None, None))
    found = encoders.check_dtypes(_task(tmp_path))
    assert not found.ok and "27% of a gradient's numbers are 0" in found.words
