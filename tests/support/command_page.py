"""Write `dist-vse --help` of every command as a page.

Run `python -m tests.support.command_page > docs/reference/cli.md`.
"""

import argparse
from collections.abc import Iterator

from dist_vse import cli

HEAD = """# Command line

Written by `python -m tests.support.command_page`. `dist-vse COMMAND --help` prints the same.
"""


def page() -> str:
    """Return every command with its arguments and options, as Markdown."""
    return "\n".join([HEAD, *_sections(cli._parser(), "dist-vse")])


def _sections(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    own = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    below = [a for a in own if isinstance(a, argparse._SubParsersAction)]
    if name != "dist-vse":
        yield f"## `{name}`\n" if name.count(" ") == 1 else f"### `{name}`\n"
        yield f"{_text(parser.description or '')}\n"
    rows = [_row(action) for action in own if action not in below]
    if rows:
        yield "\n".join(["| | |", "| --- | --- |", *rows]) + "\n"
    for action in below:
        for word, child in action.choices.items():
            yield from _sections(child, f"{name} {word}")


def _row(action: argparse.Action) -> str:
    """Return an argument or option as a row of the table."""
    value = _value(action)
    value = value.replace("|", " or ")  # a bar would end the cell
    names = [f"{option} {value}".strip() for option in action.option_strings] or [value]
    help_text = (action.help or "") % {**vars(action), "prog": "dist-vse"}
    return f"| {', '.join(f'`{name}`' for name in names)} | {_text(help_text)} |"


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
    meta = action.metavar or choices or action.dest.upper()
    return meta if isinstance(meta, str) else " ".join(meta)


def _text(text: str) -> str:
    """Escape what a table or HTML would take for its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;")


if __name__ == "__main__":
    print(page(), end="")
