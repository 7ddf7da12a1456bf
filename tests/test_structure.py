"""Functions stay small at the door: more than eight parameters need a reason beside them.

The reason is a comment on the line of the `def`, or right above it (and its decorators):

    # More than eight parameters: the formula has as many.
    def loss(...):
"""

import ast
from collections.abc import Iterator

import pytest

from tests.support.imports import sources
from tests.support.paths import ROOT

MAX_PARAMETERS = 8
REASON = "# More than eight parameters: "
PACKAGES = ("dist_vse", "launch", "shards", "benchmarks", "demo")


def crowded(source: str) -> Iterator[str]:
    """Yield the functions that have too many parameters and give no reason."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = node.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        above = lines[first - 2].strip() if first > 1 else ""
        reason = above.startswith(REASON) or REASON in lines[node.lineno - 1]
        if count > MAX_PARAMETERS and not reason:
            yield node.name


def test_more_than_eight_parameters_need_a_reason() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for package in PACKAGES
        for path in sources(package)
        for name in crowded(path.read_text(encoding="utf-8"))
    }
    assert found == set(), f"group the parameters, or write {REASON!r} above"


NINE = "def f(a, b, c, d, e, f, g, h, *, i): ..."


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (NINE, ["f"]),
        (NINE.replace(", *, i", ""), []),
        ("class A:\n    " + NINE.replace("f(", "f(self, "), ["f"]),
        ("class A:\n    " + NINE.replace("f(a", "f(self"), []),
        (f"{REASON}the formula has as many.\n{NINE}", []),
        (f"{REASON}the formula has as many.\n@cache\n{NINE}", []),
        (f"# A comment of another kind.\n{NINE}", ["f"]),
        (f"{NINE}  {REASON}the formula has as many.", []),
    ],
)
def test_what_has_too_many(source: str, found: list[str]) -> None:
    assert list(crowded(source)) == found
