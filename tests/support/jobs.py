"""What submitted jobs leave behind: their results, and the work that was pickled for them."""

from typing import Any

from dist_vse.launch.schedulers.base import SubmittedJob
from dist_vse.launch.status import job_state
from tests.support.waiting import wait_until


def results(job: SubmittedJob) -> list[Any]:
    """Wait for the job's end and return what its ranks returned."""
    from submitit.core.utils import pickle_load

    wait_until(lambda: job_state(job).ended, f"the end of job {job.job_id}")
    values = []
    for rank in range(job.num_ranks):
        log = job.log(rank)
        path = log.with_name(log.name.replace("_log.err", "_result.pkl"))
        assert path.exists(), log.read_text()
        kind, value = pickle_load(path)
        assert kind == "success", value
        values.append(value)
    return values


def pickled_work(job: SubmittedJob) -> Any:
    """Return the callable that the job's ranks run."""
    from submitit.core.utils import pickle_load

    (path,) = job.log(0).parent.glob(f"{job.job_id}_submitted.pkl")
    return pickle_load(path).function
