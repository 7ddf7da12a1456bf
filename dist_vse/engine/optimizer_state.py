"""A rank's share of the optimizer's state, in a form that any number of ranks can read back.

Under every ZeRO stage a rank holds runs of elements of flattened parameters: its *pieces*. What
the optimizer keeps of a piece is saved under `optim/KEY/PARAMETER/START`, a number that all
parameters share (Adam's step) under `optim/KEY`. So a rank of another world size or stage finds
the elements that it needs by name and position.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dist_vse.common.errors import UserError

_PREFIX = "optim"


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + length` of a flattened parameter."""

    name: str
    start: int
    length: int
    flat: Tensor
    """What torch's optimizer updates: a parameter, or DeepSpeed's partition of many."""
    offset: int
    """Where the piece begins in `flat`."""

    def within(self, tensor: Tensor) -> Tensor:
        """Return the piece's view (length,) of a tensor that is shaped like `flat`."""
        return tensor.view(-1)[self.offset : self.offset + self.length]


def find_pieces(engine: Any, module: nn.Module, *, stage: int, rank: int) -> list[Piece]:
    """List the pieces that this rank updates, from the insides of a DeepSpeed engine."""
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if stage == 0:
        return [Piece(name, 0, p.numel(), p, 0) for name, p in trainable.items()]
    zero = engine.optimizer
    if stage == 3:
        return [_partition(zero, name, p, rank) for name, p in trainable.items()]
    names = {id(p): name for name, p in trainable.items()}
    found = []
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            fragment = parameter._hp_mapping  # None: other ranks hold all of it
            if fragment is not None:
                here, there = fragment.lp_fragment_address, fragment.hp_fragment_address
                name = names[id(parameter)]
                found.append(Piece(name, here.start, here.numel, flat, there.start))
    return found


def _partition(zero: Any, name: str, parameter: Any, rank: int) -> Piece:
    """Return this rank's piece under ZeRO 3: equal parts, the last of them padded."""
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    length = max(0, min(size, parameter.ds_numel - rank * size))
    return Piece(name, rank * size, length, zero.fp32_partitioned_groups_flat[group], offset)


def dump_state(pieces: Sequence[Piece], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copy the state of these pieces to host memory, by name."""
    named = {}
    for piece in pieces:
        for key, value in optimizer.state.get(piece.flat, {}).items():
            if not torch.is_tensor(value):
                continue  # SGD notes that it has no momentum yet
            if value.shape != piece.flat.shape:
                named[f"{_PREFIX}/{key}"] = value.detach().cpu().clone()
            elif piece.length:
                name = f"{_PREFIX}/{key}/{piece.name}/{piece.start}"
                named[name] = piece.within(value).detach().cpu().clone()
    return named


def load_state(
    pieces: Sequence[Piece], optimizer: torch.optim.Optimizer, files: Sequence[Path]
) -> None:
    """Give a fresh optimizer the state of these pieces, out of the files of all former ranks.

    Raises UserError if the files lack an element of it.
    """
    with ExitStack() as stack:
        saved = _Saved([stack.enter_context(safe_open(path, "pt")) for path in files])
        by_flat: dict[int, list[Piece]] = defaultdict(list)
        for piece in pieces:
            by_flat[id(piece.flat)].append(piece)
        for group in by_flat.values():
            flat = group[0].flat
            state = {key: number.clone() for key, number in saved.numbers.items()}
            for key in saved.keys:
                state[key] = torch.zeros_like(flat)
                for piece in group:
                    saved.read(key, piece, into=piece.within(state[key]))
            if state:
                optimizer.state[flat] = state


class _Saved:
    """The named tensors of all former ranks' files."""

    def __init__(self, files: Sequence[Any]) -> None:
        self.numbers: dict[str, Tensor] = {}
        self._runs: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for file in files:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                if not name.startswith(_PREFIX + "/"):
                    continue
                _, key, *place = name.split("/")
                if not place:
                    self.numbers[key] = file.get_tensor(name)
                    continue
                (length,) = file.get_slice(name).get_shape()
                run = (int(place[-1]), length, file, name)
                self._runs[key, "/".join(place[:-1])].append(run)
        self.keys = sorted({key for key, _ in self._runs})

    def read(self, key: str, piece: Piece, *, into: Tensor) -> None:
        """Fill `into` (length,) with the piece's elements."""
        missing = piece.length
        for start, length, file, name in self._runs[key, piece.name]:
            first = max(start, piece.start)
            last = min(start + length, piece.start + piece.length)
            if first < last:
                values = file.get_slice(name)[first - start : last - start]
                into[first - piece.start : last - piece.start].copy_(values)
                missing -= last - first
        if missing:
            raise UserError(
                f"the checkpoint lacks {missing} elements of the optimizer's {key} of {piece.name}"
            )
