"""Where samples come from: one function a format, from a path to records.

To add a source, write `read_x(path, *, ...) -> Iterator[Record]` and name it in `SOURCES`. Its
keyword parameters are the command's options that it understands (`images`, `split`, `restval`).
A heavy import belongs into the function: `dist-vse --help` reads this dict.
"""

from collections.abc import Callable, Iterator

from shards.record import Record
from shards.sources.folder import read_folder
from shards.sources.jsonl import read_jsonl
from shards.sources.karpathy import read_karpathy

SOURCES: dict[str, Callable[..., Iterator[Record]]] = {
    "folder": read_folder,
    "jsonl": read_jsonl,
    "karpathy": read_karpathy,
}
