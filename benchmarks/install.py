"""What the package and each of its extras take on disk: the files of all that they need."""

import argparse
import os
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools.config.pyprojecttoml import read_configuration  # type: ignore[import-untyped]

from benchmarks import ROOT
from benchmarks.result import Result
from dist_vse.common.errors import UserError
from dist_vse.tools.bench.table import Table

MIB = 2**20
OURS = "dist-vse"
GPU = ("nvidia-", "cuda-", "triton")
LARGEST = 4  # named in the table


def run(args: argparse.Namespace) -> Result:
    """Measure what is installed here: each extra alone, and what it adds to `train`."""
    extras: list[str | None] = [None, *args.extras]
    found = {extra: distributions([extra] if extra else []) for extra in extras}
    train, torch = distributions(["train"]), needed_by("torch")
    sizes = {name: size_of(name) for name in set().union(*found.values(), train, torch)}

    def mib(names: set[str]) -> str:
        return f"{sum(sizes[name] for name in names) / MIB:,.1f}"

    gpu = {name for name in torch if name.startswith(GPU)}
    version = metadata.version("torch")
    table = Table(
        f"on disk, with torch {version} ({'for CUDA' if gpu else 'for the CPU'})",
        ("install", "packages", "MiB", "without torch", "beyond train", "its largest"),
        note="MiB of the files as pip unpacks them, without compiled .pyc. Torch and what it needs "
        f"take {mib(torch)}; {mib(gpu)} of it is for NVIDIA's GPUs, which torch's build for the "
        "CPU leaves out.",
    )
    for extra, names in found.items():
        own = names - torch - (train if extra != "train" else set())
        largest = sorted(own or names - torch, key=lambda name: -sizes[name])[:LARGEST]
        table.add_row(
            f"dist_vse[{extra}]" if extra else "dist_vse",
            str(len(names)),
            mib(names),
            mib(names - torch),
            mib(own) if extra not in (None, "train") else "",
            ", ".join(f"{name} {mib({name})}" for name in largest),
        )
    figures = {
        "torch": version,
        "bytes": sizes,
        "installs": {extra or "": sorted(names) for extra, names in found.items()},
    }
    return Result(figures, [table])


def needed_by(name: str, extras: Iterable[str] = ()) -> set[str]:
    """Return a package and all that it needs, as far as pip would install it here."""
    return _closure([(name, set(extras))])


def distributions(extras: Iterable[str]) -> set[str]:
    """Return the installed packages that dist_vse with these extras needs, itself left out.

    Our own requirements are those of pyproject.toml, since what is installed may be older. Raises
    UserError for an unknown extra, or a package that is not installed.
    """
    project = read_configuration(ROOT / "pyproject.toml", expand=False)["project"]
    optional = project["optional-dependencies"]
    lines, waiting = [*project["dependencies"]], [*extras]
    while waiting:
        extra = waiting.pop()
        if extra not in optional:
            raise UserError(f"no extra {extra!r}; there are {', '.join(optional)}")
        lines += optional[extra]
        for need in map(Requirement, optional[extra]):
            waiting += need.extras if canonicalize_name(need.name) == OURS else ()
    needs = [need for need in map(Requirement, lines) if canonicalize_name(need.name) != OURS]
    return _closure((canonicalize_name(need.name), set(need.extras)) for need in needs)


def _closure(needs: Iterable[tuple[str, set[str]]]) -> set[str]:
    found: dict[str, set[str]] = {}
    waiting = [*needs]
    while waiting:
        name, extras = waiting.pop()
        if name in found and extras <= found[name]:
            continue
        found[name] = found.get(name, set()) | extras
        for need in map(Requirement, _requirements(name)):
            marker = need.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in (*extras, "")):
                waiting.append((canonicalize_name(need.name), set(need.extras)))
    return {*found}


def size_of(name: str) -> int:
    """Return the bytes of an installed package's files."""
    files = metadata.distribution(name).files or []
    paths = (file.locate() for file in files if file.suffix != ".pyc")
    return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))


def _requirements(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        raise UserError(f"{name} is not installed; pip install -e '.[dev]'") from None
