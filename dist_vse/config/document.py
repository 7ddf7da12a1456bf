"""Write the settings as a page: `python -m dist_vse.config.document > docs/reference/config.md`."""

import ast
import inspect
from dataclasses import MISSING, fields, is_dataclass
from types import ModuleType
from typing import get_args, get_type_hints

from dist_vse.config import encoders, evaluation, optimizers, schema, sections
from dist_vse.config.schema import TrainConfig

_HEAD = """# Settings of a run

Written by `python -m dist_vse.config.document` from dist_vse/config/. Give them in a YAML
file, or behind it as `key=value`.
"""


def document() -> str:
    """Return every setting with its default and its docstring, as Markdown."""
    words = docstrings(sections, encoders, evaluation, optimizers, schema)
    return "\n".join([_HEAD, *tables(TrainConfig, "The run", words)])


def tables(
    part: type, title: str, words: dict[tuple[str, str], str], prefix: str = ""
) -> list[str]:
    """Return a dataclass's settings as a table, and those of its parts behind it."""
    hints = get_type_hints(part)
    rows, below = [], []
    for item in fields(part):
        if is_dataclass(hints[item.name]):
            inner = f"{prefix}{item.name}"
            below += tables(hints[item.name], inner, words, f"{inner}.")
            continue
        for items in get_args(hints[item.name]):  # of a list
            if isinstance(items, type) and is_dataclass(items):
                inner = f"{prefix}{item.name}[]"
                below += tables(items, inner, words, f"{inner}.")
        default = None if item.default is MISSING else item.default
        text = words.get((part.__name__, item.name), "")
        rows.append(f"| `{prefix}{item.name}` | {_plain(default)} | {text} |")
    summary = inspect.getdoc(part) or ""
    head = [f"## {title}", "", summary, "", "| key | default | |", "| --- | --- | --- |"]
    return [*head, *rows, "", *below]


def _plain(value: object) -> str:
    return "" if value in ("", None) else f"`{str(value).lower()}`"


def docstrings(*modules: ModuleType) -> dict[tuple[str, str], str]:
    """Return the text under each field, which Python itself does not keep."""
    words = {}
    for part in ast.parse("".join(map(inspect.getsource, modules))).body:
        if not isinstance(part, ast.ClassDef):
            continue
        for field, text in zip(part.body, part.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                words[part.name, field.target.id] = " ".join(str(text.value.value).split())
    return words


if __name__ == "__main__":
    print(document(), end="")
