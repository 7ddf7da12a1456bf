"""Folders and files to write are local: an address such as s3://bucket/run is refused.

As a path it would mean the local folder `s3:/bucket/run`.
"""

import re
from pathlib import Path

from dist_vse.common.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/|$)")  # two letters or more: C: is a drive


def require_local(path: str | Path, name: str = "") -> None:
    """Raise UserError for an address; `name` is the setting that holds it."""
    text = str(path)
    found = _SCHEME.match(text)
    if found is not None:
        address = f"{found[1]}://{text[found.end() :].lstrip('/')}"  # Path has dropped a slash
        raise UserError(
            f"{name}{address}: {found[1]}:// is no local path; give a folder of this machine (a "
            "mounted bucket is one), and copy it when it is complete"
        )
