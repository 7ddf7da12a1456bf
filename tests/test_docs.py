"""The pages name files that are there."""

import re
from pathlib import Path

import pytest

import dist_vse
from tests.support.imports import sources
from tests.support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
PATH = re.compile(r"(?<![\w/.{-])[a-z_]+/[\w/-]*\w\.(?:md|py|sbatch|sh|svg|yaml)\b")
LINK = re.compile(r"\]\(([^)#:]+)\)")
PROOF = re.compile(r"`(test_\w+)…` in `([\w/]+\.py)`")
SELECTED = re.compile(r"\s-k (\w+)")
BARE = re.compile(r"`([\w.-]+\.(?:md|py|sbatch|sh|svg|yaml))`")
EXAMPLES = {"configs/my.yaml"}  # what a reader is to write
WRITTEN = {"config.yaml"}  # into a run's folder
FOLDERS = (
    "benchmarks",
    "configs",
    "demo",
    "dist_vse",
    "docs",
    "examples",
    "launch",
    "shards",
    "tests",
)


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


def test_selected_tests_are_there() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    selected = set(SELECTED.findall(pages))
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py")]
    tests = re.findall(r"def (test_\w+)", "\n".join(sources))
    assert len(selected) >= 2
    missing = {word for word in selected if not any(word in name for name in tests)}
    assert not missing, f"no test has a name with {missing}"


def test_bare_file_names_are_those_of_files() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    names |= {path.name for path in ROOT.glob("*.*")}
    missing = set(BARE.findall(pages)) - names - WRITTEN
    assert not missing, f"no file is called {missing}"


def test_contributing_names_tests_that_are_there() -> None:
    proofs = PROOF.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(proofs) >= 2
    for name, path in proofs:
        assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8"), f"{path}: {name}"


def test_pages_and_sources_keep_to_plain_words() -> None:
    """Words that translators love: see CONTRIBUTING's style."""
    unwanted = re.compile(r"\b(?:heed\w*|anew|in\s+vain|told)\b", re.IGNORECASE)
    files = [
        *(
            path
            for folder in ("dist_vse", "launch", "shards", "benchmarks")
            for path in sources(folder)
        ),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
    ]
    found = [
        f"{path}: {word}" for path in files for word in unwanted.findall(path.read_text("utf-8"))
    ]
    assert not found


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "docs/reference/api.md").read_text("utf-8")
    shown = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith(":::")}
    assert {*dist_vse.__all__} - {"__version__"} <= shown
