"""What compares dist_vse with its peers, and measures it: not part of the wheel."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def import_path() -> dict[str, str]:
    """Return the variable with which a process that runs elsewhere can import this package."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}
