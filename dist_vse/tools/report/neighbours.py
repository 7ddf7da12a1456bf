"""The nearest images of each image of a page, which its script shows on a click."""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

Neighbours = Mapping[str, Sequence[Mapping[str, Any]]]
"""By the key of an image that the page shows: `key` and `score` of its nearest others."""


def all_keys(neighbours: Neighbours) -> set[str]:
    """Return the keys of all images that the page needs for it."""
    return {*neighbours, *(other["key"] for near in neighbours.values() for other in near)}


def hidden_part(neighbours: Neighbours, thumb: Callable[[str], str]) -> str:
    """Return what the script reads; `thumb` draws the images that the page does not show."""
    scores = {
        key: [[other["key"], other["score"]] for other in near] for key, near in neighbours.items()
    }
    if not scores:
        return ""
    more = "".join(thumb(key) for key in sorted(all_keys(neighbours) - neighbours.keys()))
    data = escape(json.dumps(scores, ensure_ascii=False))
    return f'<div id="neighbours" hidden data-neighbours="{data}">{more}</div>'


def thumbnail(key: str, images: Mapping[str, str] | None, name: str | None = None) -> str:
    """Return an image, or its key where no image is at hand; `name` is what readers hear."""
    if images is None:
        return f'<span class="thumb" data-key="{escape(key)}">{escape(key)}</span>'
    alt = escape(key if name is None else name)
    return f'<img class="thumb" src="{images[key]}" alt="{alt}" data-key="{escape(key)}">'
