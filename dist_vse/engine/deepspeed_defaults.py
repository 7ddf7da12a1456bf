"""DeepSpeed's engine with its own defaults, to measure other libraries' losses under ZeRO."""

from typing import Any

import torch
from torch import Tensor, nn

from dist_vse.engine.deepspeed_start import import_deepspeed


def deepspeed_engine(module: nn.Module, stage: int, *, rate: float) -> Any:
    """Return DeepSpeed's own engine with SGD, as its users start it: all else is its default.

    ZeRO 3 parts small parameters as well, as it does the large ones of a model of real size.
    """
    deepspeed = import_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=rate)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def whole_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's parameters, which ZeRO 3 may have parted; all ranks call this."""
    deepspeed = import_deepspeed()
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: p.detach().clone() for name, p in module.named_parameters()}
