"""Which module of ours imports which, read from the source: nothing is imported to find out."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.paths import ROOT

# dist_vse/launch and dist_vse/shards are links to these folders, so their modules are dist_vse's.
LINKED = ("launch", "shards")
FOLDERS = ("dist_vse", *LINKED, "benchmarks", "demo")
Graph = Mapping[str, set[str]]  # a node to the nodes that it imports


def sources(folder: str) -> list[Path]:
    """Return the Python files under a folder of the repository; links are not followed."""
    return sorted((ROOT / folder).rglob("*.py"))


def package_sources() -> list[Path]:
    """Return the Python files of the package: each once, by its path without links."""
    return [path for folder in ("dist_vse", *LINKED) for path in sources(folder)]


def module_name(path: Path) -> str:
    """Return the name that a file of ours is imported by; a package is its `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("dist_vse", *parts) if parts[0] in LINKED else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every import in a file; the name is empty for `import module`.

    Imports within functions and those for the type checker count as well.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)


def module_graph() -> dict[str, set[str]]:
    """Return which modules of ours each module of ours imports."""
    paths = {module_name(path): path for folder in FOLDERS for path in sources(folder)}
    graph: dict[str, set[str]] = {module: set() for module in paths}
    for module, path in paths.items():
        for other, name in imports(path):
            # `from a import b` needs a.b if that is a module, otherwise what a/__init__.py defines.
            target = f"{other}.{name}" if f"{other}.{name}" in paths else other
            if target in paths and target != module:
                graph[module].add(target)
    return graph


def find_cycles(graph: Graph) -> set[frozenset[str]]:
    """Return the groups of two or more nodes that all reach each other."""
    reached = {node: _reachable(graph, node) for node in graph}
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph}
    return {group for group in groups if len(group) > 1}


def _reachable(graph: Graph, start: str) -> set[str]:
    """Return the nodes that a path of one edge or more leads to."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen
