"""An export in the layout of another library: sentence-transformers, OpenCLIP, transformers.

Features of the same pixels and tokens are ours within rounding. What a library cannot express is a
UserError that says why.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_vse.config import ModelConfig
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.tools.export.card import Card
from dist_vse.tools.export.parts import shown, write_json
from dist_vse.tools.export.to_openclip import write_openclip
from dist_vse.tools.export.to_transformers import write_transformers

FORMATS: dict[str, Callable[[Path, DualEncoder, ModelConfig, str], Card]] = {
    "openclip": write_openclip,
    "transformers": write_transformers,
}
"""Formats that take the place of our own layout."""


_SENTENCES = """
    from sentence_transformers import SentenceTransformer   # and pip install 'dist_vse[train]'

    model = SentenceTransformer("{name}", trust_remote_code=True)
    scores = model.similarity(model.encode([picture]), model.encode(["a red apple"]))

The flag lets sentence-transformers import the class `dist_vse.tools.export.towers.Towers`; the
folder holds no code. `SentenceTransformer(modules=[Towers("{name}")])` needs no flag, and
`dist_vse.load` reads the folder too.
"""


def add_sentence_transformers(folder: Path, name: str) -> Card:
    """Add to an export of our own layout what sentence-transformers reads."""
    module = {"idx": 0, "name": "0", "path": "", "type": "dist_vse.tools.export.towers.Towers"}
    write_json(folder / "modules.json", [module])
    settings: dict[str, Any] = {
        "similarity_fn_name": "cosine",
        "prompts": {},
        "default_prompt_name": None,
    }
    write_json(folder / "config_sentence_transformers.json", settings)
    return Card(
        "sentence-transformers", _SENTENCES.format(name=shown(name)), ("sentence-transformers",)
    )
