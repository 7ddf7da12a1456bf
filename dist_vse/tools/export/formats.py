"""An export in the layout of another library: OpenCLIP or transformers.

Features of the same pixels and tokens are ours within rounding. What a library cannot express is a
UserError that says why.
"""

from collections.abc import Callable
from pathlib import Path

from dist_vse.config import ModelConfig
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.tools.export.card import Card
from dist_vse.tools.export.to_openclip import write_openclip
from dist_vse.tools.export.to_transformers import write_transformers

FORMATS: dict[str, Callable[[Path, DualEncoder, ModelConfig, str], Card]] = {
    "openclip": write_openclip,
    "transformers": write_transformers,
}
"""Formats that take the place of our own layout."""
