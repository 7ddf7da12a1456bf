"""Training under accelerate or torchrun inside a Slurm job that returns to the queue by itself.

`accelerate launch -m dist_vse.launch.requeued CONFIG [key=value ...]`, as
configs/clusters/accelerate.sbatch does: like `-m dist_vse.train`, but a run that was asked to save
then queues its job again.
"""

import os
import sys
from collections.abc import Sequence

from dist_vse.common import signals
from dist_vse.common.extras import run_module


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; after a requested stop, queue the job again; return the exit code."""
    signals.listen()  # before the slow imports: an early signal must not end the job
    from dist_vse import train
    from dist_vse.launch.schedulers import scontrol

    code = train.main(arguments)
    if code != train.INTERRUPTED:
        return code
    if os.environ.get("RANK") != "0":
        return 0  # an error code would make srun end the step before rank 0 has asked
    scontrol.requeue(os.environ["SLURM_JOB_ID"])
    return code


if __name__ == "__main__":
    sys.exit(run_module("dist_vse.launch.requeued"))
