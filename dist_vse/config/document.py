"""Write the settings as a page: `python -m dist_vse.config.document > docs/config.md`."""

import ast
import inspect
from dataclasses import MISSING, fields, is_dataclass
from typing import get_args, get_type_hints

from dist_vse.config import schema, sections
from dist_vse.config.schema import TrainConfig

_HEAD = """# Settings of a run

Written by `python -m dist_vse.config.document` from dist_vse/config/. Give them in a YAML
file, or behind it as `key=value`.
"""


def document() -> str:
    """Return every setting with its default and its docstring, as Markdown."""
    return "\n".join([_HEAD, *_tables(TrainConfig, "", _docstrings())])


def _tables(part: type, prefix: str, words: dict[tuple[str, str], str]) -> list[str]:
    hints = get_type_hints(part)
    rows, below = [], []
    for item in fields(part):
        if is_dataclass(hints[item.name]):
            below += _tables(hints[item.name], f"{prefix}{item.name}.", words)
            continue
        for items in get_args(hints[item.name]):  # of a list
            if isinstance(items, type) and is_dataclass(items):
                below += _tables(items, f"{prefix}{item.name}[].", words)
        default = None if item.default is MISSING else item.default
        text = words.get((part.__name__, item.name), "")
        rows.append(f"| `{prefix}{item.name}` | {_plain(default)} | {text} |")
    title = f"## {prefix.rstrip('.')}" if prefix else "## The run"
    summary = inspect.getdoc(part) or ""
    return [title, "", summary, "", "| key | default | |", "| --- | --- | --- |", *rows, "", *below]


def _plain(value: object) -> str:
    return "" if value in ("", None) else f"`{str(value).lower()}`"


def _docstrings() -> dict[tuple[str, str], str]:
    """Return the text under each field, which Python itself does not keep."""
    words = {}
    for part in ast.parse(inspect.getsource(sections) + inspect.getsource(schema)).body:
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
