"""Exports on a hub of Hugging Face's kind: nothing is sent or fetched unless a name asks for it.

The variable HF_ENDPOINT names another hub; HF_TOKEN is who asks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_vse.common.errors import UserError, first_line

PREFIX = "hf-hub:"


def push(folder: Path, name: str) -> str:
    """Upload a folder as the model `name` (OWNER/MODEL); return its address.

    A new one is private. Raises UserError if the hub refuses, or does not answer.
    """
    from huggingface_hub import HfApi

    with _asking(name):
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload the model")
    return str(address)


def fetch(name: str) -> Path:
    """Return a local copy of the model `name`; one that is here already is not fetched again.

    Raises UserError if the hub refuses, or does not answer.
    """
    from huggingface_hub import snapshot_download

    with _asking(name):
        return Path(snapshot_download(name, endpoint=os.environ.get("HF_ENDPOINT")))


@contextmanager
def _asking(name: str) -> Iterator[None]:
    from httpx import HTTPError

    try:
        yield
    except (OSError, ValueError, HTTPError) as error:  # the library's own are among these
        raise UserError(f"{PREFIX}{name}: {first_line(error)}") from error
