"""A scheduler that nobody ships: every rank is a plain subprocess of this one."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_vse.launch.cluster import ClusterConfig
from dist_vse.launch.schedulers.base import JobSpec, JobState, SubmittedJob, Work, take_turns

_ranks: dict[str, list[subprocess.Popen[bytes]]] = {}


class Toy:
    name = "toy"
    poll_s = 0.1
    results_delay_s = 0
    ctrl_c_cancels = True
    ignored_signals: tuple[str, ...] = ("USR1", "USR2", "TERM")
    rendezvous_hint = ("127.0.0.1", "<free>")

    def is_available(self) -> bool:
        return False

    def check_available(self) -> None:
        pass

    def check_cluster(self, cluster: ClusterConfig) -> None:
        pass

    def ignored_settings(self, cluster: ClusterConfig) -> list[str]:
        return [f"partition={cluster.partition}"] if cluster.partition else []

    def rank_environment(
        self, cluster: ClusterConfig, inherited: Mapping[str, str]
    ) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": "lo"}

    def parameters(
        self, cluster: ClusterConfig, *, name: str, folder: Path, env: Mapping[str, str]
    ) -> dict[str, Any]:
        return {"ranks": cluster.world_size}

    def conflicts(
        self,
        cluster: ClusterConfig,
        inherited: Mapping[str, str],
        parameters: Mapping[str, Any],
    ) -> list[str]:
        return []

    def script(self, spec: JobSpec, *, runs: int, parallel: int) -> str:
        return f"{spec.parameters['ranks']} toy processes"

    def start(self, spec: JobSpec, work: Work) -> SubmittedJob:
        from submitit.core.utils import DelayedSubmission

        job_id, size = str(time.monotonic_ns()), spec.parameters["ranks"]
        folder = Path(str(spec.folder).replace("%j", job_id))
        folder.mkdir(parents=True)
        DelayedSubmission(work).dump(folder / f"{job_id}_submitted.pkl")
        _ranks[job_id] = [self._start_rank(spec, folder, job_id, rank) for rank in range(size)]
        logs = str(folder / f"{job_id}_RANK_log.err")
        return SubmittedJob(job_id, self.name, logs, size, socket.gethostname())

    def _start_rank(
        self, spec: JobSpec, folder: Path, job_id: str, rank: int
    ) -> subprocess.Popen[bytes]:
        place = {
            "JOB_ID": job_id,
            "NTASKS": str(spec.parameters["ranks"]),
            "JOB_NUM_NODES": "1",
            "NODEID": "0",
            "GLOBALID": str(rank),
            "LOCALID": str(rank),
        }
        env = {f"SUBMITIT_LOCAL_{name}": value for name, value in place.items()}
        stem = f"{job_id}_{rank}_log"
        with (folder / f"{stem}.out").open("wb") as out, (folder / f"{stem}.err").open("wb") as err:
            return subprocess.Popen(
                f"exec {spec.python} -u -m submitit.core._submit {folder}",
                shell=True,
                env={**os.environ, **spec.env, **env, "SUBMITIT_EXECUTOR": "local"},
                stdout=out,
                stderr=err,
            )

    def start_sweep(
        self, jobs: Iterable[tuple[JobSpec, Work]], parallel: int
    ) -> Iterator[SubmittedJob]:
        return take_turns(self, jobs, parallel)

    def unreachable(self, job: SubmittedJob) -> str:
        return ""

    def state(self, job: SubmittedJob) -> JobState:
        ended = all([rank.poll() is not None for rank in _ranks[job.job_id]])
        return JobState("ENDED" if ended else "RUNNING", ended)

    def states(self, jobs: Sequence[SubmittedJob]) -> list[JobState]:
        return [self.state(job) for job in jobs]

    def cancel(self, job: SubmittedJob) -> None:
        for rank in _ranks[job.job_id]:
            rank.send_signal(signal.SIGTERM)

    def kill(self, job: SubmittedJob) -> None:
        for rank in _ranks[job.job_id]:
            rank.kill()

    def enter_rank(self, environment: Any) -> None:
        print("a toy rank", flush=True)

    def rendezvous(self, environment: Any, port: int | None) -> tuple[str, int]:
        assert port is not None
        return "127.0.0.1", port

    def on_error(self, environment: Any, error: Exception) -> None:
        os._exit(1)

    def on_result(self, environment: Any, code: Any) -> None:
        print(f"a toy rank returns {code}", flush=True)
