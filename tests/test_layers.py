"""The structure holds: imports point down the layers, and heavy libraries have one owner."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# From the bottom up: a part imports only parts that stand before it (docs/design.md draws it).
LAYERS = (
    "common",
    "config",
    "data",
    "distributed",
    "models",
    "losses",
    "engine",
    "runs",
    "training",
    "evaluation",
    "tools",
    "train",
    "cli",
)
LEVEL = {name: level for level, name in enumerate(LAYERS)}

OWNERS = {
    "torch.distributed": {"dist_vse/distributed/"},
    "deepspeed": {"dist_vse/engine/"},
    "timm": {"dist_vse/models/"},
    "transformers": {"dist_vse/models/"},
    "webdataset": {"dist_vse/data/", "dist_vse/tools/bench/"},
    "submitit": {"launch/"},
    "open_clip": {"dist_vse/tools/bench/", "dist_vse/tools/verify/", "dist_vse/models/pretrained/"},
}


def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _part(module: str) -> str | None:
    """Return the part of dist_vse that an imported name belongs to, such as `contrast`."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "dist_vse" and len(pieces) > 1 else None


def test_every_part_has_a_layer() -> None:
    parts = {
        p.relative_to(ROOT / "dist_vse").parts[0].removesuffix(".py") for p in _sources("dist_vse")
    }
    assert parts - {"__init__"} == set(LEVEL) & parts, parts - set(LEVEL)


@pytest.mark.parametrize("path", _sources("dist_vse"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = path.relative_to(ROOT / "dist_vse").parts[0].removesuffix(".py")
    for module in _imports(path):
        other = _part(module)
        if other in LEVEL and other != part:
            above = LEVEL.get(part, len(LAYERS))  # the package itself stands above all of its parts
            assert LEVEL[other] < above, f"{path.name} ({part}) must not import {module}"


def test_the_sharding_tool_needs_only_the_contract_and_no_torch() -> None:
    for path in _sources("shards"):
        for module in _imports(path):
            assert module.split(".")[0] != "torch", f"{path}: imports {module}"
            assert _part(module) in (None, "common", "data"), f"{path}: imports {module}"


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_has_one_owner(library: str) -> None:
    for folder in ("dist_vse", "launch", "shards"):
        for path in _sources(folder):
            name = str(path.relative_to(ROOT))
            if any(name.startswith(owner) for owner in OWNERS[library]):
                continue
            for module in _imports(path):
                is_it = module == library or module.startswith(library + ".")
                assert not is_it, f"{name} imports {module}: that is for {OWNERS[library]}"
