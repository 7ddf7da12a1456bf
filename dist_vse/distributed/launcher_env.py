"""Checks of the launcher's environment variables, before the ranks connect."""

import os
import socket
from collections.abc import Sequence

import torch

from dist_vse.common.errors import UserError


def check_accelerator() -> None:
    """Raise UserError if GPUs were promised that are not there."""
    if os.environ.get("DS_ACCELERATOR") == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"DS_ACCELERATOR=cuda, but PyTorch sees no GPU on {socket.gethostname()}: check "
            "nvidia-smi and CUDA_VISIBLE_DEVICES there, or set DS_ACCELERATOR=cpu"
        )


def choose_gpu() -> None:
    """Set LOCAL_RANK to 0 where this process sees one GPU only: that one must be its own.

    A launcher gives each process a GPU of its own that way (`--gpus-per-task`). Raises UserError,
    on all ranks of a node, if each sees several GPUs, but fewer than there are processes.
    """
    names = ("LOCAL_WORLD_SIZE", "1"), ("LOCAL_RANK", "0")
    processes, local_rank = (int(os.environ.get(*name)) for name in names)
    processes, seen = max(processes, local_rank + 1), torch.cuda.device_count()
    if seen == 1:
        os.environ["LOCAL_RANK"] = "0"
    elif processes > seen:
        raise UserError(
            f"{processes} processes, but PyTorch sees {seen} GPU(s) on {socket.gethostname()}: "
            "start one process a GPU, and let each see all of them (CUDA_VISIBLE_DEVICES)"
        )


def check_own_gpus(gpus: Sequence[tuple[str, str]]) -> None:
    """Raise UserError if two ranks of one node have the same GPU; `gpus` are (host, GPU) by rank.

    Where a launcher says that it starts one process a node, nothing is checked.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return
    for rank, gpu in enumerate(gpus):
        if gpu in gpus[:rank]:
            raise UserError(
                f"ranks {gpus.index(gpu)} and {rank} have the same GPU on {gpu[0]}: start one "
                "process a GPU, and let each see all of them or one of its own "
                "(CUDA_VISIBLE_DEVICES)"
            )


def check_alone() -> None:
    """Raise UserError if we are one of several processes without a launcher's variables."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        several = os.environ.get(name, "1")
        if several.isdecimal() and int(several) > 1:
            raise UserError(
                f"{name}={several}, but RANK is not set: each of these processes would train "
                "alone; use `dist-vse submit`, or see configs/clusters/accelerate.sbatch"
            )


def check_described() -> None:
    """Raise UserError if some of the launcher's variables are missing."""
    missing = [n for n in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set, but not {', '.join(missing)}: start with `accelerate launch` or "
            "`torchrun`, or unset RANK to run one process"
        )
