"""A copy of the code for each job: edits after the submission do not change the job."""

import hashlib
import os
import shutil
from pathlib import Path

import dist_vse
import launch
import shards

_PACKAGES = tuple(Path(package.__path__[0]) for package in (dist_vse, launch, shards))
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


def code_folder(folder: Path) -> Path:
    """Return where `pin` keeps the code as it is now; another content has another name."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{package.name}/{path.relative_to(package)}\n".encode())
            digest.update(path.read_bytes())
    return folder / f"code-{digest.hexdigest()[:12]}"


def pin(code: Path) -> None:
    """Copy the packages into `code`, which appears by one rename."""
    if code.is_dir():
        return
    temporary = code.with_name(f"{code.name}.{os.getpid()}.tmp")
    for package in _PACKAGES:
        shutil.copytree(package, temporary / package.name, ignore=_IGNORED)
    try:
        os.rename(temporary, code)
    except OSError:
        shutil.rmtree(temporary)
        if not code.is_dir():  # else another submission was faster
            raise
