"""A copy of the code for each job: edits after the submission do not change the job."""

import hashlib
import os
import secrets
import shutil
from pathlib import Path

import dist_vse
from dist_vse.common.errors import UserError
from dist_vse.common.terminal import one_line

_PACKAGE = Path(dist_vse.__path__[0])
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


def code_folder(folder: Path) -> Path:
    """Return where `pin` keeps the code as it is now; another content has another name."""
    digest = hashlib.sha256()
    for name, path in sorted(_our_files().items()):
        digest.update(f"{name}\n".encode())
        digest.update(path.read_bytes())
    return folder / f"code-{digest.hexdigest()[:12]}"


def pin(code: Path) -> None:
    """Copy the package into `code`, which appears by one rename.

    The job's Python reads its code there, and the folder may come from somebody else. Raises
    UserError if it is there already and holds anything but this package.
    """
    if code.is_dir():
        _check_copy(code)
        return
    temporary = code.with_name(f"{code.name}.{secrets.token_hex(8)}.tmp")
    shutil.copytree(_PACKAGE, temporary / _PACKAGE.name, ignore=_IGNORED)
    try:
        os.rename(temporary, code)
    except OSError:
        shutil.rmtree(temporary)
        if not code.is_dir():  # else another submission was faster
            raise
        _check_copy(code)


def _check_copy(code: Path) -> None:
    """Remove compiled code, which Python would run unseen; raise UserError for other changes."""
    for cache in [path for path in code.rglob("__pycache__") if path.is_dir()]:
        shutil.rmtree(cache, ignore_errors=True)
    ours, found = _our_files(), {}
    for path in code.rglob("*"):  # it does not follow links to folders
        if path.is_symlink() or not path.is_dir():
            found[str(path.relative_to(code))] = path
    odd = sorted(ours.keys() ^ found.keys())
    odd += [name for name in ours.keys() & found.keys() if not _same(ours[name], found[name])]
    if odd:
        raise UserError(
            f"{code}: is no copy of this installation's code ({one_line(odd[0])} differs); remove "
            "that folder"
        )


def _our_files() -> dict[str, Path]:
    """Return the files of the installed package by their names in a copy.

    In a checkout, parts of the package are links to folders beside it; they are followed.
    """
    return {
        str(path.relative_to(_PACKAGE.parent)): path
        for folder, _, names in os.walk(_PACKAGE, followlinks=True)
        for path in (Path(folder, name) for name in names)
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def _same(path: Path, copy: Path) -> bool:
    return copy.is_file() and path.read_bytes() == copy.read_bytes()
