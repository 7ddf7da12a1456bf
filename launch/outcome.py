"""How a job ended: its exit code, and the cause of a failure."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_vse.common.errors import first_line
from dist_vse.common.reading import BadFileError
from dist_vse.common.terminal import one_line
from dist_vse.launch.result import read_result, result_path
from dist_vse.launch.schedulers.base import SubmittedJob

# What a rank reports when another one is gone: an effect, to be shown after the cause.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|DistBackendError|DistNetworkError|Broken pipe"
)
_USER_ERROR = "dist_vse.common.errors.UserError: "


@dataclass(frozen=True)
class Outcome:
    """How one rank ended."""

    rank: int
    log: Path
    code: int = 1
    error: str = ""
    ended: float | None = None
    """Unix time of the result; none if the rank left none."""


def find_outcome(
    job: SubmittedJob, state: str, *, results_delay_s: int = 0
) -> tuple[int, list[str]]:
    """Return an ended job's exit code, and why it failed, one line for each cause.

    The code is 0 for success, 2 for a UserError of the run, 130 for a run that saved and stopped
    early, and 1 for the rest. `state` is printed for ranks that left no result. A shared file
    system may show results late: `results_delay_s`.
    """
    outcomes = _outcomes([job.log(rank) for rank in range(job.num_ranks)], state, results_delay_s)
    failed = sorted((o for o in outcomes if o.error), key=_likeliness)
    if not failed:
        return max(outcome.code for outcome in outcomes), []
    causes = [outcome for outcome in failed if _likeliness(outcome)[0] == 0] or failed
    lines = []
    for error in dict.fromkeys(outcome.error for outcome in causes):
        same = [outcome for outcome in causes if outcome.error == error]
        who = f"rank {same[0].rank}" if len(same) == 1 else f"{len(same)} ranks"
        lines.append(f"{who}: {error.removeprefix(_USER_ERROR)} (log: {same[0].log})")
    return (2 if causes[0].error.startswith(_USER_ERROR) else 1), lines


def _likeliness(outcome: Outcome) -> tuple[int, float, int]:
    """Order causes before effects: errors, ranks that were killed, ranks that lost another."""
    effect = 2 if _LOST_PEER.search(outcome.error) else int(outcome.ended is None)
    return effect, outcome.ended or 0.0, outcome.rank


def _outcomes(logs: Sequence[Path], state: str, results_delay_s: int) -> list[Outcome]:
    """Read all ranks' results."""
    while True:
        outcomes = [_outcome(rank, log, state) for rank, log in enumerate(logs)]
        failed = any(outcome.error and outcome.ended is not None for outcome in outcomes)
        if failed or results_delay_s <= 0 or all(o.ended is not None for o in outcomes):
            return outcomes
        time.sleep(1)
        results_delay_s -= 1


def _outcome(rank: int, log: Path, state: str) -> Outcome:
    """Read how a rank ended from the result beside its log."""
    try:
        result = read_result(log)
        if result is None:
            return Outcome(rank, log, error=f"killed, or exited without a result ({state})")
        ended = result_path(log).stat().st_mtime
    except (BadFileError, OSError) as error:
        return Outcome(rank, log, error=f"its result can't be read ({first_line(error)})")
    return Outcome(rank, log, result.code, one_line(result.error), ended)
