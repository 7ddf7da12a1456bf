"""Finding the builder that an entry of an encoder table names."""

import importlib
from typing import Any


def import_builder(entry: str) -> Any:
    """Return the function of `module:function`."""
    module, name = entry.split(":")
    return getattr(importlib.import_module(module), name)
