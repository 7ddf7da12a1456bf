"""The settings in a run's config as text, read fast: a table may show ten thousand runs."""

import functools
import re
from collections import ChainMap
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.reading import BadFileError, read_text
from dist_vse.config.load import MAX_BYTES, flat, flat_config, load_config
from dist_vse.config.schema import TrainConfig

_SECTION = re.compile(r"^(?=[A-Za-z_])", re.MULTILINE)
_UNUSUAL = re.compile(r"""(?:^|[\s,[{])[&*!][^\s'"]|\$\{""")  # anchors, tags, other settings


def read_settings(path: Path) -> dict[str, str]:
    """Return what `flat_config` returns of the file's config, each value as text.

    The runs of a sweep share most of their sections, and each section is parsed once. Values are
    not checked. A file that is not as `dump_config` writes it is read by `load_config`. Raises
    UserError if it can't be read.
    """
    try:
        text = read_text(path, max_bytes=MAX_BYTES)
        sections = [_read_section(section) for section in _SECTION.split(text)]
    except (BadFileError, UserError):
        return {key: str(value) for key, value in flat_config(load_config(path)).items()}
    return dict(ChainMap(*reversed(sections), _defaults()))


@functools.cache
def _defaults() -> dict[str, str]:
    return {key: str(value) for key, value in flat_config(TrainConfig()).items()}


@functools.lru_cache(maxsize=1 << 12)
def _read_section(text: str) -> dict[str, str]:
    """Return the settings of a part of a file. Raises BadFileError if it is not as we write it."""
    import yaml

    if _UNUSUAL.search(text):
        raise BadFileError("unusual")
    try:
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError, MemoryError) as error:
        raise BadFileError("no YAML") from error
    known = {key.split(".")[0] for key in _defaults()}
    if content is not None and (not isinstance(content, dict) or not known.issuperset(content)):
        raise BadFileError("no settings")
    return {key: str(value) for key, value in flat(content or {}).items()}
