"""Sample keys that are safe as file names in a tar, unique, and the same on every run."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

MAX_CHARS = 80  # with an extension well under the 100 bytes of a tar's name field
_HASH_CHARS = 8
_SAFE = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_CHARS}}}")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")  # a dot would end WebDataset's key


def safe_key(name: str) -> str:
    """Return `name` if it is a safe key, else a readable safe form with a hash of `name`.

    The hash keeps apart names that look alike once cleaned ("a.b" and "a/b"), and depends on
    no other sample.
    """
    if _SAFE.fullmatch(name):
        return name
    ascii_form = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    safe = _UNSAFE.sub("_", ascii_form)
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:_HASH_CHARS]
    return f"{safe[: MAX_CHARS - _HASH_CHARS - 1]}-{digest}"


def safe_keys(names: Iterable[str]) -> Iterator[str]:
    """Yield a safe key for each name; a key that is taken gets `-2`, `-3` in the order given."""
    taken: set[str] = set()
    count: dict[str, int] = {}
    for name in names:
        base = key = safe_key(name)
        while key in taken:
            count[base] = count.get(base, 1) + 1
            key = f"{base}-{count[base]}"
        taken.add(key)
        yield key
