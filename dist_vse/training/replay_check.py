"""Whether the encoders can be run twice with equal results, as gradient caching does.

Three chunks of made-up pairs pass through the model, and then again in the order of the second
pass. One chunk would not do: what draws from a generator of its own often repeats the first one.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.common.random_state import own_generators, random_state, replay, restore
from dist_vse.models.dual_encoder import DualEncoder, frozen_statistics, made_up_pairs
from dist_vse.models.precision import autocast

NUM_CHUNKS = 3
_ROWS = 2  # a chunk's pairs: BatchNorm needs two
_ROUNDING = 2**-6  # features that differ by less may differ by rounding, in bfloat16 too


class Replay(NamedTuple):
    """How the second pass compares with the first one."""

    error: float
    """Largest difference of the outputs, relative to the largest output; 0.0 where all is well."""
    different: str | None
    """The first module whose output differed."""
    in_float16: str | None
    """The first module that returned float16."""


def check_replay(model: DualEncoder, *, image_size: int, num_tokens: int, precision: str) -> None:
    """Raise UserError, with the module's name, for one that cannot be trained exactly.

    Either it draws random numbers that cannot be drawn again, or it runs in float16 where
    `precision` does not ask for it. Call it before an engine stands around the model; it leaves
    no trace.
    """
    found = compare_passes(model, image_size=image_size, num_tokens=num_tokens, precision=precision)
    if found.in_float16 is not None and precision != "fp16":
        raise UserError(
            f"{found.in_float16} runs in float16 with engine.precision={precision}, where its "
            "gradients would underflow: turn autocast off around it "
            "(dist_vse.models.precision.float32_rnn), or set engine.precision=fp32"
        )
    if found.error > _ROUNDING:
        raise UserError(
            f"{found.different} does not draw the same random numbers again, so gradient caching "
            "would give wrong gradients: hold its generator as an attribute of the module "
            "(torch.Generator, random.Random or NumPy's), or draw from PyTorch's"
        )


def compare_passes(
    model: DualEncoder, *, image_size: int, num_tokens: int, precision: str
) -> Replay:
    """Encode made-up chunks twice, as the two passes of a step do, and compare the outputs."""
    here = next(model.parameters()).device
    made_up = made_up_pairs(model, _ROWS, image_size=image_size, num_tokens=num_tokens)
    watch = _Watch(model)
    generators = own_generators(model)
    first, states = [], []
    now = random_state(generators)
    with (
        replay(now),
        frozen_statistics(model),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        autocast(here, precision),
        watch.hooked(),
    ):
        chunk = model.prepare(**{name: value.to(here) for name, value in made_up.items()})
        for _ in range(NUM_CHUNKS):
            states.append(random_state(generators))
            restore(states[-1])  # as the first pass does
            first.append(watch.outputs(chunk))
        error, different = 0.0, None
        for state, before in zip(reversed(states), reversed(first), strict=True):
            # With a graph, as in a step: without one checkpointing does nothing.
            with replay(state), torch.enable_grad():
                after = watch.outputs(chunk)
            for name in before:
                if not torch.equal(before[name], after[name]):
                    different = different or name
                    if name in _FEATURES:
                        gap = (before[name] - after[name]).abs().max() / before[name].abs().max()
                        error = max(error, float(gap))
    return Replay(error, different, watch.in_float16)


_FEATURES = ("model.image", "model.text")  # the towers


class _Watch:
    """Sees what every module of a model returns."""

    def __init__(self, model: DualEncoder) -> None:
        self.model = model
        self.in_float16: str | None = None
        self._names = {module: f"model.{name}" for name, module in model.named_modules() if name}
        self._outputs: dict[str, Tensor] = {}

    def outputs(self, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encode; return the towers' features, and a sum of what each module inside returned."""
        self._outputs = {}
        self.model(**chunk)
        return self._outputs

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """See them in the block."""
        hooks = [module.register_forward_hook(self._see) for module in self._names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, tuple) and output:  # an RNN's, or an attention's
            output = output[0]
        if not isinstance(output, Tensor):
            return
        name = self._names[module]
        if output.dtype == torch.float16 and self.in_float16 is None:
            self.in_float16 = f"{name} ({type(module).__name__})"
        if name in _FEATURES:
            self._outputs[name] = output.detach().clone()
        elif not any(True for _ in module.children()):
            self._outputs[f"{name} ({type(module).__name__})"] = output.detach().double().sum()
