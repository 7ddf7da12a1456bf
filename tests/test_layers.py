"""The structure holds: imports point down the layers, no cycle, heavy libraries have one owner."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.imports import (
    FOLDERS,
    LINKED,
    find_cycles,
    imports,
    module_graph,
    module_name,
    package_sources,
    sources,
)
from tests.support.paths import ROOT

# From the bottom up: a part imports only parts before it. docs/explain/design.md draws it.
# `shards` and `launch` are links in dist_vse/ to folders beside it.
LAYERS = (
    "common",
    "distributed",
    "losses",
    "config",
    "data",
    "shards",
    "models",
    "engine",
    "runs",
    "training",
    "evaluation",
    "tools",
    "train",
    "launch",
    "cli",
)
LEVEL = {name: level for level, name in enumerate(LAYERS)}

CARRIED = "dist_vse/tools/export/transformers_modeling.py"  # copied into exports, not imported
OWNERS = {
    "torch.distributed": {
        "dist_vse/distributed/",
        "dist_vse/common/cpu.py",
        "dist_vse/engine/fsdp2.py",
    },
    "deepspeed": {"dist_vse/engine/"},
    "timm": {"dist_vse/models/", CARRIED},
    "transformers": {"dist_vse/models/", CARRIED},
    "peft": {"dist_vse/models/"},
    "webdataset": {"dist_vse/data/"},
    "submitit": {"launch/"},
    "open_clip": {
        "dist_vse/tools/verify/",
        "dist_vse/models/pretrained/",
        "dist_vse/models/class_names.py",
    },
}


def _imported(path: Path) -> Iterator[str]:
    """Yield what a file imports: `from a import b` gives `a` and `a.b`, since b may be a module."""
    for module, name in imports(path):
        yield module
        yield f"{module}.{name}"


def _part(module: str) -> str | None:
    """Return the part of dist_vse that an imported name belongs to, such as `losses`."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "dist_vse" and len(pieces) > 1 else None


def _part_of(path: Path) -> str:
    """Return the part of dist_vse that a file belongs to; the package itself is `dist_vse`."""
    return _part(module_name(path)) or "dist_vse"


def test_the_package_shows_its_layers_and_nothing_else() -> None:
    parts = {_part_of(path) for path in package_sources()}
    assert parts == {*LAYERS, "dist_vse"}
    own = parts - {*LINKED}
    assert len(own) <= 14, "fewer entries show the architecture; put a module where it belongs"


@pytest.mark.parametrize("name", [*LINKED, "configs"])
def test_a_folder_beside_the_package_is_a_link_in_it(name: str) -> None:
    link = ROOT / "dist_vse" / name
    assert link.is_symlink() and link.resolve() == ROOT / name


@pytest.mark.parametrize(
    "folder", ["dist_vse", "launch", "shards", "tests", "benchmarks", "demo", "examples"]
)
def test_every_folder_with_code_is_a_package(folder: str) -> None:
    for path in sources(folder):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} is left out of the wheel"


@pytest.mark.parametrize("path", package_sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = _part_of(path)
    for module in _imported(path):
        other = _part(module)
        if other in LEVEL and other != part:
            above = LEVEL.get(part, len(LAYERS))  # the package itself stands above all of its parts
            assert LEVEL[other] < above, f"{path.name} ({part}) must not import {module}"


def test_linked_folders_are_imported_as_parts_of_the_package() -> None:
    for folder in (*FOLDERS, "tests"):
        for path in sources(folder):
            wrong = {name for name in _imported(path) if name.split(".")[0] in LINKED}
            assert not wrong, f"{path}: import dist_vse.{min(wrong)} instead"


def test_no_modules_import_each_other() -> None:
    found = [" -> ".join(sorted(cycle)) for cycle in find_cycles(module_graph())]
    assert not found, f"these import each other in a circle: {found}"


def test_a_cycle_is_found() -> None:
    assert find_cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert find_cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {frozenset("bc")}


def test_the_sharding_tool_needs_only_the_contract_and_no_torch() -> None:
    for path in sources("shards"):
        for module in _imported(path):
            assert module.split(".")[0] != "torch", f"{path}: imports {module}"
            assert _part(module) in (None, "common", "data", "shards"), f"{path}: imports {module}"


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_has_one_owner(library: str) -> None:
    for path in package_sources():
        name = str(path.relative_to(ROOT))
        if any(name.startswith(owner) for owner in OWNERS[library]):
            continue
        for module in _imported(path):
            is_it = module == library or module.startswith(library + ".")
            assert not is_it, f"{name} imports {module}: that is for {OWNERS[library]}"
