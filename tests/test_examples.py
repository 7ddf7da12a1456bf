"""The examples: our loss in loops of other libraries, two processes against one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from dist_vse.launch.environment import free_port
from examples import with_ddp
from examples.__main__ import NEEDS, TOLERANCE, compare, missing
from tests.support.paths import ROOT

LINES = 100


def _main(rank: int, variables: dict[str, str]) -> None:
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    with_ddp.main()


def test_plain_ddp_equals_one_process(tmp_path: Path) -> None:
    """As `python -m examples with_ddp`, from ranks that are forked with their imports done."""
    weights: list[Any] = []
    for count in (1, 2):
        out = tmp_path / f"{count}.pt"
        variables = {
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
            "EXAMPLE_OUT": str(out),
        }
        mp.start_processes(_main, (variables,), count, start_method="forkserver")
        weights.append(torch.load(out))
    error = float((weights[1] - weights[0]).abs().max())
    print(f"with_ddp: weights of two processes and of one differ by {error:.1e}")
    assert error < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NEEDS if name != "with_ddp"])
def test_an_example_equals_one_process(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if missing(name):
        pytest.skip(f"{name}: not installed: {', '.join(missing(name))}")
    error = compare(name)
    with capsys.disabled():
        print(f"{name}: weights of two processes and of one differ by {error:.1e}")
    assert error < TOLERANCE


def test_every_example_is_run_and_short() -> None:
    files = {path.stem: path for path in (ROOT / "examples").glob("with_*.py")}
    assert files.keys() == NEEDS.keys()
    for path in files.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) < LINES, path
