"""Render benchmarks/results/ as the pages of docs/benchmarks/: one page a folder, a file a section.

A new measurement is a new JSON file (`python -m benchmarks NAME --out FILE`, or `dist-vse bench
scale --out FILE`), and no edit of prose. A person may add a "title" and "notes" on how it is
measured, which stay when it is measured again, and "remarks" on these figures, which don't.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks import ROOT

RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks"
MADE = "<!-- Made by `python -m benchmarks render` from benchmarks/results/{}/; do not edit. -->"


def render() -> None:
    """Write every page again; one whose results are gone is removed."""
    PAGES.mkdir(parents=True, exist_ok=True)
    pages = render_pages()
    for path in PAGES.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        (PAGES / name).write_text(text, encoding="utf-8")


def render_pages() -> dict[str, str]:
    """Return the text of every page by its file's name."""
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    return {f"{folder.name}.md": _page(folder) for folder in folders}


def _about(name: str) -> str:
    """Return the guide or explanation whose figures these are, as seen from docs/."""
    pages = (ROOT / "docs" / part / f"{name}.md" for part in ("guides", "explain"))
    page = next(page for page in pages if page.exists())
    return page.relative_to(ROOT / "docs").as_posix()


def _page(folder: Path) -> str:
    results = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    name = folder.name
    parts = [
        MADE.format(name),
        f"# Measured: {name}",
        f"What it is about: [{name}](../{_about(name)}).",
    ]
    return "\n\n".join([*parts, *map(section, results)]) + "\n"


def section(result: dict[str, Any]) -> str:
    """Return the Markdown of one result."""
    parts = [f"## {result.get('title') or result['benchmark']}"]
    if result.get("command"):
        parts.append(f"```\n{result['command']}\n```")
    parts.append(_measured_on(result))
    parts += result.get("notes", [])
    parts += [markdown(**table) for table in result["tables"]]
    parts += result.get("remarks", [])
    return "\n\n".join(parts)


def _measured_on(result: dict[str, Any]) -> str:
    """Return one line: when, on what, and with which versions."""
    machine, versions = result["machine"], result.get("versions", {})
    words = [result["date"] or "date not noted", machine.get("cpu"), f"{machine['cores']} cores"]
    words.append(machine.get("gpu") or machine.get("device"))
    words += [f"{name} {version}" for name, version in versions.items()]
    words += [f"{name}={value}" for name, value in result.get("environment", {}).items()]
    return ", ".join(word for word in words if word) + "."


def markdown(title: str, columns: list[str], rows: list[list[str]], note: str = "") -> str:
    """Return a table as Markdown, its title above and its note below."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    table = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    return "\n\n".join(part for part in (title and f"**{title}**", table, note) if part)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
