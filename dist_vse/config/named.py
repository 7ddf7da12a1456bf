"""The configs that come with the package: their names, and the file that a name or a path means."""

import difflib
from collections.abc import Mapping
from pathlib import Path

from dist_vse.common.errors import UserError

FOLDER = Path(__file__).parents[1] / "configs"
_LIST = "; `dist-vse config list` prints the names of those that come with dist_vse"


def named_configs() -> dict[str, Path]:
    """Return the configs by name, such as `demo` and `clusters/local`, in the order of a list.

    What is no YAML file keeps its extension: `clusters/accelerate.sbatch`.
    """
    paths = [path for path in FOLDER.glob("**/*") if path.is_file() and path.name[0] != "."]
    names = {str(path.relative_to(FOLDER)).removesuffix(".yaml"): path for path in paths}
    return dict(sorted(names.items(), key=lambda item: (item[0].count("/"), item[0])))


def find_config(given: str | Path) -> Path:
    """Return the file that a path or a name means; a file of that path wins.

    The last part of a name is enough: `local` is `clusters/local`. Raises UserError for neither a
    file nor a name.
    """
    path = Path(given)
    if path.is_file():
        return path
    found = _find_name(str(given), named_configs())
    if found is not None:
        return found
    beside = {p.name: str(p) for p in sorted(path.parent.glob("*.yaml"))}
    hint = _nearest(path.name, beside) or _nearest_name(str(given))
    if not hint:
        hint = f"; there are {', '.join(beside.values())}" if beside else _LIST
    raise UserError(f"{given}: no such config{hint}")


def named_config(name: str) -> Path:
    """Return the file that a name means. Raises UserError, with the nearest one, for no name."""
    found = _find_name(name, named_configs())
    if found is None:
        raise UserError(f"{name}: no config that comes with dist_vse{_nearest_name(name) or _LIST}")
    return found


def _find_name(name: str, named: Mapping[str, Path]) -> Path | None:
    if name in named:
        return named[name]
    last = [path for full, path in named.items() if full.rpartition("/")[2] == name]
    return last[0] if len(last) == 1 else None


def _nearest_name(given: str) -> str:
    names = [*named_configs()]
    known = {full.rpartition("/")[2]: full for full in names} | {full: full for full in names}
    return _nearest(given.removeprefix("configs/").removesuffix(".yaml"), known)


def _nearest(word: str, known: Mapping[str, str]) -> str:
    """Return a hint at the nearest of the known words, as it is to be written; empty if none is."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {known[near[0]]!r}?" if near else ""
