"""JSON from outside, and JSON for our files, without what other readers refuse."""

import json
import math
from typing import Any

MAX_DEPTH = 100
_STRICT = json.JSONEncoder(allow_nan=False)


def load_json(data: str | bytes) -> Any:
    """Parse JSON in UTF-8; a byte-order mark is dropped.

    Raises ValueError for what is no JSON, or nested deeper than `MAX_DEPTH`.
    """
    text = data.decode() if isinstance(data, bytes) else data
    text = text.removeprefix("\ufeff")
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(content) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    return content


def dump_json(content: dict[str, Any]) -> bytes:
    """Return JSON in ASCII; NaN and infinities, which JSON does not know, become null."""
    try:
        return _STRICT.encode(content).encode()
    except ValueError:
        return _STRICT.encode(_finite(content)).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(of) for name, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _depth(content: Any) -> int:
    """Return how deep lists and objects are nested; without recursion."""
    depth, level = 0, [content]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [e for v in level for e in (v.values() if isinstance(v, dict) else v)]
    return depth
