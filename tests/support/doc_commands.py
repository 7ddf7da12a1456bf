"""The command lines of README and docs, each held against the parser that will read it.

`python -m tests.support.doc_commands` checks all. It needs no package, so that a bare Python of any
version can run it.
"""

import argparse
import contextlib
import io
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from benchmarks import __main__ as benchmarks
from dist_vse import cli
from dist_vse.common.arguments import parse_arguments
from dist_vse.tools.verify import cli as verify
from tests.support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:dist-vse|python -m|pytest|make) [^`\n]+)`")
PLAIN = re.compile(r"(?:\w+=\S* )*(?:dist-vse|python|pytest|make|sbatch|torchrun|accelerate) ")
PLACEHOLDER = re.compile(r"\[[^\]=]*(?:=[^\]]*)?\]\s*(?=\s|$)|…|\.\.\.")
VARIABLE = re.compile(r"[A-Z_]+=\S*")
LAUNCHERS = ("accelerate", "torchrun", "deepspeed")
FOREIGN = ("pip", "curl", "apt-get", "export", "source")  # commands of others, in our pages


@dataclass(frozen=True, order=True)
class DocCommand:
    """A command line of a page: its words, without variables, placeholders and comments."""

    page: str
    line: str
    whole: bool
    """False inside a sentence, where `dist-vse embed` stands for any use of it."""

    def words(self) -> list[str]:
        """Return the words that a shell would pass."""
        line = self.line.replace("[key=value …]", "key=value")
        line = line.replace("SOURCE", "folder").replace("COMMAND", "train")
        words = shlex.split(PLACEHOLDER.sub("", line))
        while words and VARIABLE.fullmatch(words[0]):
            words.pop(0)
        return words


_parser = cache(cli._parser)
_benchmarks = cache(benchmarks._parser)


@cache
def _verify() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the words behind `dist-vse`, as it does itself."""
    return parse_arguments(_parser(), words)


def find_commands() -> list[DocCommand]:
    """Return the commands of all pages, each once a page."""
    found = set()
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for language, block in FENCE.findall(text):
            for line in block.splitlines():
                line = re.split(r"(?:^|\s)#(?:\s|$)", line)[0].strip()
                if line and (language == "sh" or (not language and PLAIN.match(line))):
                    found.add(DocCommand(name, line, True))
        found |= {DocCommand(name, line, False) for line in INLINE.findall(text)}
    return sorted(command for command in found if command.words())


def check(command: DocCommand) -> str:
    """Return why a command cannot be run as it stands, or an empty text."""
    words = command.words()
    program = Path(words[0]).name
    if program == "dist-vse":
        return _parses(parse, words[1:], whole=command.whole)
    if program in LAUNCHERS and "--no-python" in words:
        return _parses(parse, words[words.index("dist-vse") + 1 :], whole=True)
    if program in (*LAUNCHERS, "python"):
        return _check_module(words, whole=command.whole)
    if program == "sbatch":
        at = next(n for n, word in enumerate(words) if n and not word.startswith("-"))
        how = ["train"] if words[at].endswith("/accelerate.sbatch") else ["bench", "scale"]
        return _check_file(words[at]) or _parses(parse, [*how, *words[at + 1 :]], whole=True)
    if program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        made = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
        return "".join(f"no target {target}; " for target in targets if target not in made)
    if program == "pytest":
        return "".join(_check_file(word) for word in words[1:] if word.startswith("tests"))
    return "" if program in FOREIGN else f"what is {program}?"


def _check_module(words: Sequence[str], *, whole: bool) -> str:
    at = next((n for n, word in enumerate(words) if word in ("-m", "--module")), None)
    if at is None:
        return _check_file(words[1])
    module, rest = words[at + 1], words[at + 2 :]
    if module == "benchmarks":
        return _parses(_benchmarks().parse_args, rest, whole=whole)
    if module == "dist_vse.cli":
        return _parses(parse, rest, whole=whole)
    if module == "dist_vse.train":
        return _parses(parse, ["train", *rest], whole=whole)
    if module == "dist_vse.tools.verify":
        return _parses(partial(parse_arguments, _verify()), rest, whole=whole)
    source = ROOT / module.replace(".", "/")
    file = source / "__main__.py" if source.is_dir() else source.with_suffix(".py")
    dead = _check_file(str(file.relative_to(ROOT)))
    text = "" if dead else file.read_text("utf-8")
    unknown = [word for word in rest if word.startswith("--") and f'"{word}"' not in text]
    return dead or "".join(f"{module} has no {word}; " for word in unknown)


def _check_file(path: str) -> str:
    return "" if (ROOT / path).exists() else f"no file {path}; "


def _parses(read: Callable[[list[str]], object], words: Sequence[str], *, whole: bool) -> str:
    """Return the parser's complaint; inside a sentence, `x` stands for missing arguments."""
    complaint = ""
    for missing in range(1 if whole else 4):
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                read([*words, *["x"] * missing])
        except SystemExit as end:
            if not end.code:
                return ""
            complaint = errors.getvalue().strip().splitlines()[-1]
            if not whole and re.search(r"choice: 'x'|value: 'x'|required: --", complaint):
                return ""
        else:
            return ""
    return complaint


def main() -> int:
    """Check every command with this Python; print each that fails, and return 1 if there is one."""
    commands = find_commands()
    wrong = [(command, why) for command in commands if (why := check(command))]
    for command, why in wrong:
        print(f"{command.page}: {command.line}: {why}", file=sys.stderr)
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {python}: {len(commands)} command lines of the pages, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
