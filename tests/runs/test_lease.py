"""One attempt of a run at a time may write, whenever the attempts start."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.runs import lease
from dist_vse.runs.files import LEASE_NAME
from dist_vse.runs.lease import LostLease
from tests.support.distributed import run_distributed


def test_an_earlier_attempt_of_a_job_can_not_take_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held = lease.acquire(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(LostLease, match="this earlier attempt exits without writing"):
        lease.acquire(tmp_path)
    held.check()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    lease.acquire(tmp_path)
    with pytest.raises(LostLease, match="job 8"):
        held.check()


@pytest.mark.parametrize("last", ["outer", "inner"])
def test_of_two_attempts_at_the_same_moment_one_holds_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    replace, inner = os.replace, []

    def acquire_meanwhile(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        if last == "outer":
            inner.append(lease.acquire(tmp_path))
            replace(source, target)
        else:
            replace(source, target)
            inner.append(lease.acquire(tmp_path))

    monkeypatch.setattr(os, "replace", acquire_meanwhile)
    if last == "inner":
        with pytest.raises(LostLease):
            lease.acquire(tmp_path)
        inner[0].check()
        return
    outer = lease.acquire(tmp_path)
    assert outer.attempt == inner[0].attempt  # both read the same file
    outer.check()
    with pytest.raises(LostLease):
        inner[0].check()


@pytest.mark.parametrize("content", [b"", b'{"attempt": 3, "tok', b"3", b"\xff"])
def test_a_file_cut_short_lets_nobody_write_and_anybody_start(
    tmp_path: Path, content: bytes
) -> None:
    held = lease.acquire(tmp_path)
    (tmp_path / LEASE_NAME).write_bytes(content)
    with pytest.raises(UserError, match=f"{LEASE_NAME}: missing or cut short") as told:
        held.check()
    assert not isinstance(told.value, LostLease)  # nobody goes on with this run
    lease.acquire(tmp_path).check()
    with pytest.raises(LostLease):
        held.check()
    assert {path.name for path in tmp_path.iterdir()} == {LEASE_NAME}
    assert json.loads((tmp_path / LEASE_NAME).read_text())["attempt"] == 1


def _be_taken_over(folder: Path) -> tuple[type, str]:
    held = distributed.broadcast_object(
        lease.acquire(folder) if distributed.is_main_process() else None
    )
    if distributed.is_main_process():
        lease.acquire(folder)
    try:
        with distributed.raise_on_all_ranks():
            if distributed.is_main_process():
                held.check()
    except UserError as error:
        return type(error), str(error)
    return type(None), ""


def test_every_rank_can_tell_that_its_run_was_taken_over(tmp_path: Path) -> None:
    first, second = run_distributed(_be_taken_over, 2, tmp_path)
    assert first == second
    assert first[0] is LostLease and "(on rank 0)" in first[1]
