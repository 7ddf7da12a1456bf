"""The table of very many runs: little work for each of them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.config import LossConfig, OptimConfig, TrainConfig, dump_config, flat_config
from dist_vse.config import flat as flat_module
from dist_vse.config.flat import read_settings
from dist_vse.launch.runs import find_runs, table
from dist_vse.launch.schedulers import scontrol
from dist_vse.launch.status import last_metrics


def _write(path: Path, config: TrainConfig) -> dict[str, str]:
    path.write_text(dump_config(config))
    return {key: str(value) for key, value in flat_config(config).items()}


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(output_dir="a: b #c", project="*odd & 'quoted'", seed=7),
        TrainConfig(
            loss=LossConfig(name="info_nce", temperature=1e-5),
            optim=OptimConfig(options={"a": True, "b": [1, 2.5]}),
            trackers=["wandb"],
        ),
    ],
)
def test_settings_are_those_that_the_config_loads(config: TrainConfig, tmp_path: Path) -> None:
    wanted = _write(tmp_path / "config.yaml", config)
    assert read_settings(tmp_path / "config.yaml") == wanted


def test_an_older_or_unusual_config_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("# old\nseed: 3\noutput_dir: ${project}/x\n")
    found = read_settings(path)
    assert found["seed"] == "3" and found["output_dir"].endswith("/x")
    assert found["loss.name"] == TrainConfig().loss.name
    for text in (
        "sed: 3\n",
        "[1, 2]\n",
        "seed: {\n",
        "seed: !!python/name:os.system x\n",
        "loss: &a {name: *a}\n",
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml"):
            read_settings(path)


def test_a_table_parses_each_section_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> TrainConfig:
        raise AssertionError("a config was loaded and checked for a table")

    monkeypatch.setattr(flat_module, "load_config", load)
    config = TrainConfig(output_dir="RUN", seed=-1)
    text = dump_config(config)
    for number in range(50):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        own = text.replace("RUN", str(run)).replace("seed: -1\n", f"seed: {number % 5}\n")
        (run / "config.yaml").write_text(own)
    flat_module._read_section.cache_clear()
    head, *rows = table(find_runs([tmp_path])).splitlines()
    assert head.split()[:3] == ["run", "seed", "state"] and len(rows) == 50
    sections = text.count("\n") - text.count("\n ") + 1
    assert flat_module._read_section.cache_info().misses <= sections + 50 + 5


def test_the_last_metrics_are_read_from_the_end(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": step, "loss": 1.0} for step in range(1, 5001)]
    recalls = {"i2t_r1": 1.0, "t2i_r1": 2.0, "rsum": 3.0}
    lines.insert(10, {"kind": "eval", "step": 10, **recalls})  # type: ignore[dict-item]
    path = tmp_path / "metrics.jsonl"
    torn = '{"kind": "train", "step": 5001, "lo'
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    found = last_metrics(tmp_path)
    assert found["train"] == lines[-1] and found["eval"]["step"] == 10
    with path.open("r+b") as file:
        file.write(b"\0" * 100)  # the first lines are damaged, and nobody asks for them
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + json.dumps({"kind": "eval", "step": 9, **recalls}).encode())
    assert last_metrics(tmp_path)["eval"]["step"] == 9


_SHOWN = """\
JobId=7 JobName=a UserId=u JobState=RUNNING Reason=None Requeue=1 Restarts=0
JobId=9 ArrayJobId=8 ArrayTaskId=0 JobName=b JobState=COMPLETED Reason=None Requeue=1
JobId=8 ArrayJobId=8 ArrayTaskId=1,3-5,7-11:2%2 JobName=b JobState=PENDING Requeue=1
JobId=20 JobName=c JobState=NODE_FAIL Requeue=0
"""


def test_slurm_is_asked_once_for_all_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, code, _SHOWN, "")

    monkeypatch.setattr(subprocess, "run", run)
    code = 0
    ids = ["7", "8_0", "8_1", "8_2", "8_4", "8_9", "8_10", "20", "99"]
    states = scontrol.job_states(ids)
    assert [state.name for state in states] == [
        *("RUNNING", "COMPLETED", "PENDING", "FORGOTTEN", "PENDING", "PENDING", "FORGOTTEN"),
        *("NODE_FAIL", "FORGOTTEN"),
    ]
    assert [state.ended for state in states] == [
        *(False, True, False, True, False, False, True, True, True)
    ]
    assert asked == [["scontrol", "--oneliner", "show", "job"]]
    code = 1  # no answer is no end
    assert {(s.name, s.ended) for s in scontrol.job_states(ids)} == {("UNKNOWN", False)}
