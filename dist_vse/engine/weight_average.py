"""An exponential moving average (EMA) of the weights, in samples.

A rank averages the fragments that its optimizer updates. So the average is split over the ranks as
the optimizer's state is, and is the same for every engine and number of ranks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dist_vse.common.host_copy import host_copy
from dist_vse.distributed import all_reduce_sum
from dist_vse.engine.optimizer_state import Fragment, SavedFragments

_PREFIX, _KEY = "ema", "average"


class WeightAverage:
    """The average of this rank's fragments of the weights; saved under `ema/average/NAME/START`."""

    def __init__(self, fragments: Sequence[Fragment], samples: int) -> None:
        """Begin with the weights as they are; `samples` is the horizon."""
        self._fragments, self._samples = fragments, samples
        self._flats = {id(fragment.flat): fragment.flat.detach() for fragment in fragments}
        self._averages = {key: flat.clone() for key, flat in self._flats.items()}

    @torch.no_grad()
    def update(self, samples_seen: int, batch: int) -> None:
        """Take in the weights after a step of `batch` samples; `samples_seen` counts them.

        Weights lose a factor e of their share in `samples`. Until so many are seen the average is
        the mean of all steps: nothing remembers the random start.
        """
        if self._averages:
            share = max(-math.expm1(-batch / self._samples), batch / samples_seen)
            torch._foreach_lerp_([*self._averages.values()], [*self._flats.values()], share)

    def dump(self) -> dict[str, Tensor]:
        """Copy the averages of this rank's fragments to host memory, by name."""
        return {
            f"{_PREFIX}/{_KEY}/{fragment.name}/{fragment.start}": host_copy(values)
            for fragment, values in self._pieces(self._averages)
        }

    @torch.no_grad()
    def load(self, files: Sequence[Path]) -> None:
        """Take the averages out of all former ranks' files; without any, the weights as they are.

        Raises UserError if the files lack a part of them.
        """
        for key, average in self._averages.items():
            average.copy_(self._flats[key])
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(path, "pt")) for path in files]
            saved = SavedFragments(opened, _PREFIX)
            for fragment, values in self._pieces(self._averages) if saved.keys else ():
                saved.read(_KEY, fragment, into=values)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Exchange averages and weights inside the block, where the model has the very fragments.

        That is so where an engine updates the model's own parameters, whole or in shards.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @contextmanager
    def copied_to(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Hold the averages of all ranks in whole parameters; every rank calls this."""
        self._copy(self._averages, parameters)
        try:
            yield
        finally:
            self._copy(self._flats, parameters)

    @torch.no_grad()
    def _exchange(self) -> None:
        for key, average in self._averages.items():
            weights = self._flats[key].clone()
            self._flats[key].copy_(average)
            average.copy_(weights)

    @torch.no_grad()
    def _copy(self, tensors: Mapping[int, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        pieces: dict[str, list[tuple[Fragment, Tensor]]] = {name: [] for name in parameters}
        for fragment, values in self._pieces(tensors):
            pieces[fragment.name].append((fragment, values))
        for name, parameter in parameters.items():
            whole = torch.zeros_like(parameter).view(-1)
            for fragment, values in pieces[name]:
                whole[fragment.start : fragment.start + fragment.length] = values
            # Each element is one rank's, and zero is added to it.
            parameter.copy_(all_reduce_sum(whole).view_as(parameter))

    def _pieces(self, tensors: Mapping[int, Tensor]) -> Iterator[tuple[Fragment, Tensor]]:
        """Yield this rank's fragments that are not empty, with their elements of `tensors`."""
        for fragment in self._fragments:
            if fragment.length:
                yield fragment, fragment.within(tensors[id(fragment.flat)])


def take_averages(weights: Mapping[str, Tensor], files: Sequence[Path]) -> dict[str, Tensor]:
    """Return whole weights with the averages that a checkpoint's files of all ranks hold.

    Raises UserError if the files lack a part of them.
    """
    taken = dict(weights)
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, "pt")) for path in files]
        saved = SavedFragments(opened, _PREFIX)
        for name in saved.names(_KEY) & taken.keys():
            whole = taken[name].clone().contiguous()
            saved.read(_KEY, Fragment(name, 0, whole.numel(), whole, 0), into=whole.view(-1))
            taken[name] = whole
    return taken
