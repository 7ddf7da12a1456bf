"""The exported model as a module of sentence-transformers, for texts and images.

`modules.json` of an export names the class here. sentence-transformers imports classes of other
packages under `trust_remote_code=True` only, though the folder holds no code. The path of this
class is part of the format.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modality import infer_batch_modality
from sentence_transformers.base.modules import InputModule

from dist_vse.tools.export.load import load, read_pixels


class Towers(InputModule):  # type: ignore[misc] # sentence-transformers is optional
    """Both encoders of a model that `dist-vse export` wrote."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        embedder = load(folder)
        self.model = embedder.model  # found by nn.Module, so it moves and trains
        self._words, self._square, self._dim = embedder.tokenizer, embedder.square, embedder.dim

    @classmethod
    def load(cls, model_name_or_path: str, **given: Any) -> "Towers":
        """Load a folder, or the files of a model on the hub."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        kept = {name: given[name] for name in names if name in given}
        return cls(cls.load_dir_path(model_name_or_path, **kept))

    @property
    def modalities(self) -> list[str]:
        """What `encode` takes: strings, or PIL images."""
        return ["text", "image"]

    def get_embedding_dimension(self) -> int:
        """Return the size of the shared space."""
        return self._dim

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return tokens or pixels. Raises UserError for what cannot be read."""
        if infer_batch_modality(inputs, supported_modalities=self.modalities) == "image":
            return {"pixels": read_pixels(inputs, self._square)}
        texts = [(prompt or "") + text for text in inputs]
        return {"tokens": self._words(texts)}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add unit features (b, d)."""
        if "pixels" in features:
            features["sentence_embedding"] = self.model.encode_images(features["pixels"])
        else:
            features["sentence_embedding"] = self.model.encode_texts(features["tokens"])
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Copy the export. Its weights are those that were loaded: train with dist_vse."""
        unchanged = load(self.folder).model.state_dict()
        own = self.model.state_dict()
        if not all(torch.equal(own[name].cpu(), unchanged[name]) for name in unchanged):
            raise NotImplementedError("weights that changed are not saved; train with dist_vse")
        shutil.copytree(self.folder, output_path, dirs_exist_ok=True)
