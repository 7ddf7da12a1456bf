"""The trace of a few steps names their parts."""

import json
from pathlib import Path

import torch

from dist_vse.common import step_timer
from dist_vse.training.profiler import BEFORE, TRACED, profiled


def _step() -> None:
    step_timer.begin("encode")
    torch.ones(8, 8) @ torch.ones(8, 8)
    step_timer.begin("loss")
    with step_timer.collective():
        pass
    step_timer.begin(step_timer.OTHER)


def test_a_trace_of_three_steps_has_their_parts(tmp_path: Path) -> None:
    path = tmp_path / "run" / "profile.json"
    with profiled(path) as traced:
        for _ in range(BEFORE + TRACED - 1):
            _step()
            traced()
        assert not path.exists()
        _step()
        traced()
        assert path.exists()
        _step()  # no one looks any more
        traced()
    events = json.loads(path.read_text())["traceEvents"]
    names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert names.count("encode") == names.count("gather") == TRACED
    assert sum(e["name"] == "aten::mm" for e in events) == TRACED
    assert [p.name for p in path.parent.iterdir()] == ["profile.json"]


def test_no_path_traces_nothing() -> None:
    with profiled(None) as traced:
        traced()
