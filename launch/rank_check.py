"""What `dist-vse doctor` runs in every rank of a job: communicate, compute, check the memory."""

import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.units import GIB

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RankCheck:
    """A job's work: check files, memory and precision, and reduce a tensor over the ranks."""

    bf16: bool
    needed_gib: float
    """Memory of a rank."""
    shard: str | None
    """A file of the data, to read from."""
    folder: str
    """The run's folder, to write to."""

    def __call__(self) -> int:
        """Return 0. Raises UserError if the sum is wrong, or a rank lacks something."""
        import torch

        from dist_vse import distributed

        with distributed.process_group():
            here = distributed.device()
            with distributed.raise_on_all_ranks():
                _check_files(self.shard, Path(self.folder))
                _check_precision(here, bf16=self.bf16)
                _check_memory(here, self.needed_gib)
            size = distributed.world_size()
            with distributed.raise_on_all_ranks():
                ones = torch.ones(1 << 20, device=here)
                total = distributed.all_reduce_sum(ones)[0].item()
                if total != size:
                    raise UserError(f"the all-reduce of ones over {size} ranks gave {total}")
        return 0


def _check_files(shard: str | None, folder: Path) -> None:
    """Read from the data and write into the run's folder: a node may see neither."""
    host = socket.gethostname()
    try:
        if shard is not None:
            with open(shard, "rb") as file:
                file.read(512)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        words = f"{error.strerror}; the data and output_dir must be visible on every node"
        raise UserError(f"{error.filename or folder}: {host} can't access it ({words})") from error


def _check_precision(here: "torch.device", *, bf16: bool) -> None:
    """Run a matrix product forward and backward in the run's precision."""
    import torch

    dtype = torch.bfloat16 if bf16 else torch.float32
    if here.type == "cuda" and bf16 and not torch.cuda.is_bf16_supported():
        raise UserError(f"{_name(here)} has no bfloat16; set engine.precision=fp32")
    try:
        x = torch.eye(64, device=here, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()
    except RuntimeError as error:
        reason = first_line(error)
        raise UserError(f"{_name(here)} can't compute in {dtype} ({reason})") from error


def _check_memory(here: "torch.device", needed_gib: float) -> None:
    import psutil
    import torch

    if here.type == "cuda":
        free = torch.cuda.mem_get_info(here)[0] / GIB
    else:
        free = psutil.virtual_memory().available / int(os.environ["LOCAL_WORLD_SIZE"]) / GIB
    if needed_gib > free:
        raise UserError(
            f"a rank needs {needed_gib:.2f} GiB in a step, but {_name(here)} has {free:.2f} GiB "
            "free for it; lower chunk_size, raise engine.zero_stage, or use more nodes"
        )


def _name(here: "torch.device") -> str:
    return f"{here} of {socket.gethostname()}"
