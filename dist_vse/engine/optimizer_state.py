"""A rank's share of the optimizer's state, in a form that any number of ranks can read back.

Under every ZeRO stage a rank holds runs of elements of flattened parameters: its *fragments*. The
optimizer's state of a fragment is saved under `optim/KEY/PARAMETER/START`, and a number that all
parameters share (Adam's step) under `optim/KEY`. So a rank of another world size or stage finds
the elements that it needs by name and position.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.common.host_copy import host_copy
from dist_vse.common.terminal import short

_PREFIX = "optim"
_WHOLE, _GROUPS = "whole", "group"  # of optimizers that step whole parameters
_NUMBERS: dict[str, type] = {"bool": bool, "int": int, "float": float}
_START = re.compile(r"\d{1,18}", re.ASCII)
_COUNTS = {"step", "k"}  # what some of timm's optimizers count in their groups


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + length` of a flattened parameter."""

    name: str
    start: int
    length: int
    flat: Tensor
    """What torch's optimizer updates: a parameter, or DeepSpeed's partition of many."""
    offset: int
    """Where the fragment begins in `flat`."""

    def within(self, tensor: Tensor) -> Tensor:
        """Return the fragment's view (length,) of a tensor that is shaped like `flat`."""
        return tensor.view(-1)[self.offset : self.offset + self.length]


def dump_state(
    fragments: Sequence[Fragment], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Copy the state of these fragments to host memory, by name."""
    named = {}
    for fragment in fragments:
        for key, value in optimizer.state.get(fragment.flat, {}).items():
            if not torch.is_tensor(value):
                continue  # SGD notes that it has no momentum yet
            if value.shape != fragment.flat.shape:
                named[f"{_PREFIX}/{key}"] = host_copy(value)
            elif fragment.length:
                name = f"{_PREFIX}/{key}/{fragment.name}/{fragment.start}"
                named[name] = host_copy(fragment.within(value))
    return named


def load_state(
    fragments: Sequence[Fragment], optimizer: torch.optim.Optimizer, files: Sequence[Path]
) -> None:
    """Give a fresh optimizer the state of these fragments, out of the files of all former ranks.

    Raises UserError if the files lack an element of it.
    """
    fused = any(group.get("fused") for group in optimizer.param_groups)
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, "pt")) for path in files]
        saved = SavedFragments(opened, _PREFIX)
        by_flat: dict[int, list[Fragment]] = defaultdict(list)
        for fragment in fragments:
            by_flat[id(fragment.flat)].append(fragment)
        for group in by_flat.values():
            flat = group[0].flat
            # A fused optimizer counts its steps on the device.
            at = flat.device if fused else torch.device("cpu")
            state = {key: number.to(at, copy=True) for key, number in saved.numbers.items()}
            for key in saved.keys:
                state[key] = torch.zeros_like(flat)
                for fragment in group:
                    saved.read(key, fragment, into=fragment.within(state[key]))
            if state:
                optimizer.state[flat] = state


def dump_whole_state(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Copy all of the state of an optimizer that steps whole parameters, by name.

    Tensors of any shape and plain numbers, which some keep in their groups (LAMB's step).
    """
    named = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if (saved := _to_tensor(value)) is not None:
                named[f"{_WHOLE}/{key}/{type(value).__name__}/{name}"] = saved
    for key in _COUNTS & optimizer.param_groups[0].keys():
        value = optimizer.param_groups[0][key]
        if (saved := _to_tensor(value)) is not None:
            named[f"{_GROUPS}/{key}/{type(value).__name__}"] = saved
    return named


def load_whole_state(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, files: Sequence[Path]
) -> None:
    """Give a fresh optimizer the state of whole parameters.

    Raises UserError if there is none, or one of other parameters.
    """
    found = set()
    for path in files:
        with safe_open(path, "pt") as file:
            for place in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                kind, *rest = place.split("/", 3)
                if kind == _GROUPS:
                    if len(rest) != 2 or rest[0] not in _COUNTS:
                        raise _unknown(place)
                    for group in optimizer.param_groups:
                        group[rest[0]] = _of_type(file.get_tensor(place), rest[1], place)
                elif kind == _WHOLE:
                    if len(rest) != 3 or rest[2] not in parameters:
                        raise _unknown(place)
                    key, type_name, name = rest
                    value = _of_type(file.get_tensor(place), type_name, place)
                    if torch.is_tensor(value) and value.ndim:
                        value = value.to(parameters[name].device)
                    optimizer.state[parameters[name]][key] = value
                    found.add(name)
    if len(found) < len(parameters):
        raise UserError(
            f"the checkpoint lacks the optimizer's state of {len(parameters) - len(found)} "
            "parameters; start from its weights by model.from_run, with a new optimizer"
        )


def _count(value: Tensor, name: str) -> Tensor:
    """Return a number that all parameters share: steps, or a product of factors."""
    if not bool(value.double().isfinite()) or value < 0:
        raise _unknown(name)
    return value


def _unknown(name: str) -> UserError:
    return UserError(
        f"the checkpoint holds {short(name)}, which no optimizer of ours writes so; continue from "
        "an older checkpoint, or start from its weights by model.from_run"
    )


def _of_type(value: Tensor, type_name: str, place: str) -> Any:
    # A clone: tensors that are read twice from a file share its memory.
    if type_name not in _NUMBERS:
        return value.clone()
    if value.ndim or not bool(value.double().isfinite()):
        raise _unknown(place)
    return _NUMBERS[type_name](value.item())


def _to_tensor(value: object) -> Tensor | None:
    if torch.is_tensor(value):
        return host_copy(value)
    return torch.tensor(value) if isinstance(value, bool | int | float) else None


class SavedFragments:
    """The named tensors of all former ranks' files: `PREFIX/KEY/PARAMETER/START`."""

    def __init__(self, files: Sequence[Any], prefix: str) -> None:
        """Look through opened files of safetensors."""
        self.numbers: dict[str, Tensor] = {}
        self._runs: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for file in files:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                if not name.startswith(prefix + "/"):
                    continue
                _, key, *place = name.split("/")
                shape = file.get_slice(name).get_shape()
                if not place and shape == []:
                    self.numbers[key] = _count(file.get_tensor(name), name)
                    continue
                if len(place) < 2 or len(shape) != 1 or not _START.fullmatch(place[-1]):
                    raise _unknown(name)
                run = (int(place[-1]), shape[0], file, name)
                self._runs[key, "/".join(place[:-1])].append(run)
        self.keys = sorted({key for key, _ in self._runs})
        if "exp_avg_sq" in self.keys and "step" not in self.numbers:  # Adam counts its steps
            raise UserError("the checkpoint lacks the optimizer's step; continue from an older one")

    def names(self, key: str) -> set[str]:
        """Return the parameters of which there are fragments."""
        return {name for own, name in self._runs if own == key}

    def read(self, key: str, fragment: Fragment, *, into: Tensor) -> None:
        """Fill `into` (length,) with the fragment's elements."""
        missing = fragment.length
        for start, length, file, name in self._runs[key, fragment.name]:
            first = max(start, fragment.start)
            last = min(start + length, fragment.start + fragment.length)
            if first < last:
                values = file.get_slice(name)[first - start : last - start]
                into[first - fragment.start : last - fragment.start].copy_(values)
                missing -= last - first
        if missing:
            raise UserError(
                f"the checkpoint lacks {missing} elements of {key} of {fragment.name}; copy the "
                "files of all ranks (rank-*.safetensors)"
            )
