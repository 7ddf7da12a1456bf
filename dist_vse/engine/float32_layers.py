"""Which layers autocast leaves in float32, found by running the model."""

import torch
from torch import Tensor, nn

from dist_vse.common.random_state import own_generators, random_state, replay
from dist_vse.models.dual_encoder import DualEncoder, frozen_statistics, made_up_pairs
from dist_vse.models.precision import HALVES, autocast

_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d)  # autocast casts all their parameters
_ROWS = 2  # BatchNorm needs two


def float32_layers(
    model: DualEncoder, precision: str, *, image_size: int, num_tokens: int
) -> set[nn.Module]:
    """Return the layers, such as norms, whose parameters autocast does not cast.

    Layers hold no other modules. One that is never called is not among them: another module reads
    its weights, as attention does. Leaves no trace.
    """
    here, found = next(model.parameters()).device, set[nn.Module]()

    def see(module: nn.Module, inputs: object, output: object) -> None:
        half = isinstance(output, Tensor) and output.dtype == HALVES[precision]
        if not (isinstance(module, _CAST) and half):
            found.add(module)

    hooks = [
        module.register_forward_hook(see)
        for module in model.modules()
        if not any(True for _ in module.children()) and any(True for _ in module.parameters())
    ]
    made_up = made_up_pairs(model, _ROWS, image_size=image_size, num_tokens=num_tokens)
    try:
        with (
            replay(random_state(own_generators(model))),
            frozen_statistics(model),
            torch.no_grad(),
            autocast(here, precision),
        ):
            pairs = {name: value.to(here) for name, value in made_up.items()}
            model(**model.prepare(**pairs))
    finally:
        for hook in hooks:
            hook.remove()
    return found
