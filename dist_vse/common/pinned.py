"""Host memory from which a GPU copies by itself, without a copy by the host before."""

import weakref

import torch
from torch import Tensor

from dist_vse.common.log import logger


def register(x: Tensor) -> None:
    """Register the memory of a tensor, which lives as long as the tensor, with CUDA.

    Afterwards `pin_memory` returns its parts as they are. To pin a batch of 4,096 images again
    takes a tenth of a step or more.
    """
    memory = x.untyped_storage()
    address, size = memory.data_ptr(), memory.nbytes()
    cudart = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(address, size, 0))
    if code:
        logger.warning(
            "CUDA can't register %.1f GiB of shared memory for batches (error %d), so each batch "
            "is copied once more; `ulimit -l` may be too low",
            *(size / 2**30, code),
        )
        return
    weakref.finalize(x, cudart.cudaHostUnregister, address)
