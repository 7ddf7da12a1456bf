"""Check 13: a rank that raises, and one that hangs, end all ranks in time and are named.

python -m dist_vse.launch.gpu_checks.faults raise|hang SECONDS is what each rank runs.
"""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dist_vse.common.terminal import say
from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.launch.gpu_checks.processes import Ended, Place, run_ranks

WORDS = "a fault that doctor has planted on rank 1"
SECONDS = {True: 10.0, False: 3.0}  # that a rank may wait for another one, on a GPU or not
LATEST = 40.0  # seconds after those: NCCL's own watchdog takes its time


def check_faults(task: Task) -> Finding:
    """Start two pairs of ranks at once, with a planted fault each; see who ends when, and says."""
    place = Place(gpus=_gpus() if task.on_gpu else 0, ranks=2)
    limit = SECONDS[task.on_gpu]
    with ThreadPoolExecutor() as pool:
        pairs = {
            kind: pool.submit(_run_pair, kind, limit, place, task) for kind in ("raise", "hang")
        }
        ended = {kind: pair.result() for kind, pair in pairs.items()}
    faults = [fault for kind, pair in ended.items() if (fault := _fault(kind, pair))]
    figures = {
        kind: [{"code": one.code, "seconds": round(one.seconds, 1)} for one in pair]
        for kind, pair in ended.items()
    }
    times = "; ".join(
        f"{kind}: {' and '.join(f'{one.seconds:.0f} s' for one in pair)}"
        for kind, pair in ended.items()
    )
    words = f"with a limit of {limit:g} s the ranks ended after ({times}), each with a reason"
    logs = {"logs": {kind: [one.log[-2000:] for one in pair] for kind, pair in ended.items()}}
    return Finding(not faults, "; ".join(faults) or words, figures | (logs if faults else {}))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _run_pair(kind: str, limit: float, place: Place, task: Task) -> list[Ended]:
    folder = Path(task.folder, kind)
    folder.mkdir()
    return run_ranks(
        ["-m", "dist_vse.launch.gpu_checks.faults", kind, str(limit)],
        2,
        place,
        folder,
        limit_s=min(limit + LATEST, task.left_s() - 5),
        extra={"DIST_VSE_HANG_S": str(limit)},
    )


def _fault(kind: str, pair: list[Ended]) -> str | None:
    """Say what went wrong with a pair, if anything did."""
    if any(one.code == 0 for one in pair):
        return f"{kind}: a rank ended as if all were well"
    if any(one.code is None for one in pair):
        left = [str(rank) for rank, one in enumerate(pair) if one.code is None]
        return f"{kind}: ranks {', '.join(left)} had to be killed after {pair[0].seconds:.0f} s"
    wanted = WORDS if kind == "raise" else "it hangs at"
    if wanted not in pair[1].log:
        return f"{kind}: rank 1 does not say {wanted!r}"
    return None


def main(kind: str, limit_s: float) -> None:
    """Be a rank: rank 1 raises or hangs, rank 0 waits for it."""
    import torch

    from dist_vse import distributed
    from dist_vse.distributed import watchdog

    with distributed.process_group(limit_s), watchdog.watching(limit_s):
        x = torch.ones(1 << 10, device=distributed.device())
        distributed.all_reduce_sum(x)
        watchdog.progress()
        if distributed.rank() == 1:
            if kind == "raise":
                raise RuntimeError(WORDS)
            threading.Event().wait()
        say(distributed.all_reduce_sum(x)[0].item())


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
