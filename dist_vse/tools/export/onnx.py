"""The two towers as ONNX graphs, for programs without PyTorch."""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from dist_vse.common.errors import UserError, first_line
from dist_vse.tools.export.load import Embedder


class _Features(nn.Module):
    """A tower as a function of its raw input alone."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, raw: Tensor) -> Tensor:
        features: Tensor = self.tower(raw)
        return features


def write_onnx(embedder: Embedder, folder: Path) -> None:
    """Write `image.onnx` (uint8 (b, 3, size, size)) and `text.onnx` (int64 (b, l)), b and l free.

    Both return `features`, float32 (b, d) of unit length. Raises UserError if the extra `onnx` is
    missing, or if a model cannot be expressed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        hint = "install it with `pip install 'dist_vse[onnx]'`"
        raise UserError(f"--onnx needs the packages of the extra onnx; {hint}") from None
    for tower in ("image", "text"):
        write_tower(embedder, tower, folder)


def write_tower(embedder: Embedder, name: str, folder: Path) -> None:
    """Write `image.onnx` or `text.onnx`. Raises UserError if the tower cannot be expressed."""
    tower = getattr(embedder.model, name)
    shapes = {0: Dim("b", min=1)}
    if name == "image":
        size = embedder.square.size
        raw = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    else:
        raw = embedder.tokenizer(["one two three", "four"])
        shapes |= {1: Dim("l", min=1)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Features(tower).eval(),
                (raw,),
                str(folder / f"{name}.onnx"),
                input_names=["images" if name == "image" else "tokens"],
                output_names=["features"],
                dynamic_shapes=(shapes,),
                external_data=False,
                verbose=False,
            )
    except OSError:
        raise  # the disk's
    except Exception as error:  # of the exporter, of torch.export, or of an operator
        raise UserError(
            f"the {name} tower cannot be written as ONNX ({first_line(error)}); export without "
            "--onnx"
        ) from error
    shape = program.model.graph.inputs[0].shape if program else None
    assert shape is not None
    if any(isinstance(shape[axis], int) for axis in shapes):  # a GRU's, unrolled by the exporter
        raise UserError(
            f"the {name} tower cannot be written as ONNX (its graph would hold for one shape of "
            "input alone, as a GRU's does); export without --onnx"
        )
