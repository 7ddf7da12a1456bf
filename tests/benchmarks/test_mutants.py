"""The faults of `benchmarks.mutants` can still be put in, and their tests exist."""

import re
from pathlib import Path

import pytest

from benchmarks import mutants
from benchmarks.mutants import main
from benchmarks.support.faults import MUTANTS, Mutant
from tests.support.paths import ROOT


def test_every_fault_has_its_line_and_its_tests() -> None:
    assert main(["--check"]) == 0
    for mutant in MUTANTS:
        text = (ROOT / mutant.tests).read_text(encoding="utf-8")
        names = re.findall(r"def (test_\w+)", text)
        assert any(w in n for n in names for w in mutant.words.split(" or ")), mutant.name
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.slow
def test_a_fault_is_killed_or_survives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, tests = "dist_vse/shards/build/plan.py", "tests/shards/test_plan.py"
    line = "num_bytes + size > options.shard_bytes"
    seen = Mutant("seen", path, line, "True", tests, "exactly")
    unseen = Mutant("unseen", path, line, f"{line} + 0", tests, "exactly")
    monkeypatch.setattr(mutants, "MUTANTS", (seen, unseen))
    assert main([]) == 1
    said = capsys.readouterr().out
    assert "seen: killed\nunseen: SURVIVES\n2 faults, 1 survive: unseen" in said
