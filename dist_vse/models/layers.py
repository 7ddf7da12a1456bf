"""The layers of a trunk in order, from its stem to its last block: for rates and freezing."""

import re
from fnmatch import fnmatchcase

from torch import nn

POSITIONS = (
    "*pos_embed*",
    "*position*",
    "*cls_token*",
    "*class_embed*",
    "*reg_token*",
    "*relative_attention_bias*",
)
"""Names of position and class embeddings in timm, transformers, OpenCLIP and our text trunk."""
_AT_THE_END = ("proj", "text_projection")  # of OpenCLIP, which lists them before its blocks


def layer_numbers(trunk: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter by name: 0 is the stem, then block by block.

    What follows the blocks, such as the last norm, belongs to the last one. A timm model has its
    own groups; other trunks are grouped by their longest list of equal blocks, or as an RNN's
    layers. A trunk of neither kind is one layer.
    """
    for name, module in trunk.named_modules():
        if hasattr(module, "group_matcher"):
            from timm.models import group_parameters  # slow to import, and needed for timm only

            prefix = f"{name}." if name else ""
            groups = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
            own = {f"{prefix}{key}": number for key, number in groups.items()}
            last = max(own.values())
            return {key: own.get(key, last) for key, _ in trunk.named_parameters()}
    blocks = [re.compile(pattern) for pattern in _block_patterns(trunk)]
    numbers: dict[str, int] = {}
    number = 0
    for name, _ in trunk.named_parameters():
        number = next((i for i, block in enumerate(blocks, 1) if block.match(name)), number)
        numbers[name] = len(blocks) if name.split(".")[-1] in _AT_THE_END else number
    return numbers


def _block_patterns(trunk: nn.Module) -> list[str]:
    """Return expressions for the names of each block's parameters; of an RNN, of each layer's."""
    best: list[str] = []
    for name, module in trunk.named_modules():
        inside = re.escape(f"{name}." if name else "")
        if isinstance(module, nn.RNNBase):
            patterns = [rf"{inside}\w+_l{layer}(_|$)" for layer in range(module.num_layers)]
        elif isinstance(module, nn.ModuleList | nn.Sequential) and len(set(map(type, module))) == 1:
            patterns = [
                inside + re.escape(f"{key}.")
                for key, block in module.named_children()
                if any(True for _ in block.parameters())
            ]
        else:
            continue
        best = max(best, patterns, key=len)
    return best


def blocks(trunk: nn.Module) -> list[nn.Module]:
    """Return the members of a trunk's lists of equal blocks, inner ones before outer ones."""
    found: dict[nn.Module, None] = {}
    for module in reversed([*trunk.modules()]):
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(set(map(type, module))) == 1:
            found |= {block: None for block in module if any(True for _ in block.parameters())}
    return [*found]


def is_position(name: str) -> bool:
    """Return whether a parameter's name is that of a position or class embedding."""
    return any(fnmatchcase(name, pattern) for pattern in POSITIONS)
