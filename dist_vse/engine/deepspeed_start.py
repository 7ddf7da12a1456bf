"""DeepSpeed, imported and started without its noise."""

import os
from typing import Any

import torch

from dist_vse.distributed import world_size
from dist_vse.engine import deepspeed_internals as internals

IMPORTS = ("torch._inductor.compile_fx", "deepspeed", "deepspeed.runtime.zero.stage3")
"""Slow to import; for a server of which ranks are forked."""


def import_deepspeed() -> Any:
    """Import DeepSpeed without its log lines and without compiling anything."""
    if world_size() == 1 and "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists on it
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no GPU
    import deepspeed

    internals.skip_shared_memory_operator()
    internals.time_collectives(deepspeed.comm)
    internals.quiet_log()
    internals.quiet_warnings()
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
    )
    return deepspeed
