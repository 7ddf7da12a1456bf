"""How long the sentences of the docs are: `python -m benchmarks.prose [--ref COMMIT]`.

Tables, code, headings and generated pages are left out: they are not read as sentences.
"""

import argparse
import re
import statistics
import subprocess
from itertools import chain

from benchmarks import ROOT

LONG = 30
CODE = re.compile(r"```.*?```|^(?: {4,}|\t).*?$", re.DOTALL | re.MULTILINE)
NOT_PROSE = re.compile(r"^(?:#|\||!\[|<|:::|\s*$)")
END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`*\[(])")


def sentences(text: str) -> list[str]:
    """Return the sentences of a Markdown page."""
    blocks: list[str] = [""]
    for line in CODE.sub("", text).splitlines():
        if NOT_PROSE.match(line):
            blocks.append("")
        elif re.match(r"\s*(?:[-*]|\d+\.)\s", line):
            blocks.append(re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "", line))
        else:
            blocks[-1] += " " + line.strip()
    found = [part for block in blocks for part in END.split(block.strip())]
    return [part for part in found if len(part.split()) > 2]


def _pages(ref: str | None) -> dict[str, str]:
    """Return the pages of the checkout, or of a commit."""
    listing = ["git", "ls-tree", "-r", "--name-only", ref] if ref else ["git", "ls-files"]
    names = _git(listing).split("\n")
    wanted = [n for n in names if n.endswith(".md") and (n.startswith("docs/") or "/" not in n)]
    made = ("docs/benchmarks/", "docs/reference/", "docs/config.md", "docs/cluster.md", "CHANGELOG")
    kept = [name for name in wanted if not name.startswith(made)]
    if ref:
        return {name: _git(["git", "show", f"{ref}:{name}"]) for name in kept}
    return {name: (ROOT / name).read_text("utf-8") for name in kept}


def _git(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main(arguments: list[str] | None = None) -> int:
    """Print each page's number of sentences, their median length and the share of long ones."""
    parser = argparse.ArgumentParser(description="Measure the sentences of the docs.")
    parser.add_argument("--ref", metavar="COMMIT", help="the pages of this commit")
    ref = parser.parse_args(arguments).ref
    pages = {name: sentences(text) for name, text in _pages(ref).items()}
    print(f"{'page':32} sentences  median words  over {LONG} words")
    for name, found in [*sorted(pages.items()), ("all", [*chain(*pages.values())])]:
        words = [len(sentence.split()) for sentence in found] or [0]
        share = sum(n > LONG for n in words) / len(words)
        print(f"{name:32} {len(found):9} {statistics.median(words):13.0f} {share:13.0%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
