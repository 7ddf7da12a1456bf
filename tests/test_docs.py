"""The pages name files that are there."""

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
PATH = re.compile(r"(?<![\w/.{-])[a-z_]+/[\w/-]*\w\.(?:md|py|sbatch|sh|svg|yaml)\b")
LINK = re.compile(r"\]\(([^)#:]+)\)")
PROOF = re.compile(r"`(test_\w+)…` in `([\w/]+\.py)`")
EXAMPLES = {"configs/my.yaml"}  # what a reader is to write


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_path_and_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = {path for path in set(PATH.findall(text)) - EXAMPLES if "NAME" not in path}
    dead = [
        p
        for p in paths
        if not any((at / p).exists() for at in (ROOT, ROOT / "dist_vse", page.parent))
    ]
    dead += [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not dead, f"{page.name} names what isn't there: {dead}"


def test_contributing_names_tests_that_are_there() -> None:
    proofs = PROOF.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(proofs) >= 2
    for name, path in proofs:
        assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8"), f"{path}: {name}"
