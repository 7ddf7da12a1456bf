"""What submitit runs in every process of a job: find the process's place, then do the work."""

import argparse
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from dist_vse.common import signals
from dist_vse.common.log import logger, setup_logging
from dist_vse.launch.environment import Place, conflicts
from dist_vse.launch.result import Result, last_message, result_path, write_result
from dist_vse.launch.schedulers.base import Scheduler


@dataclass(frozen=True)
class Job:
    """A picklable callable: `work()` on every rank of the job, with its environment set."""

    work: Callable[[], Any]
    scheduler: Scheduler
    env: Mapping[str, str]
    """The same on all ranks."""
    folder: str
    """The working directory: paths in the config are relative to it."""
    port: int | None = None
    """A free port of the machine that submits, for schedulers that start ranks there."""

    def __call__(self) -> Any:
        """Do the work in the process that submitit started; return its result.

        A scheduler may exit instead, to make the result the process's exit code.
        """
        os.chdir(self.folder)  # Python was started in the folder of the pinned code
        environment = submitit.JobEnvironment()
        self.scheduler.enter_rank(environment)
        log = Path(environment.paths.stderr)
        result_path(log).unlink(missing_ok=True)  # of an earlier attempt
        enter(self._place(environment), self.env)
        try:
            result = self.work()
        except Exception as error:
            self.scheduler.on_error(environment, error)
            write_result(log, Result(1, last_message(traceback.format_exc())))
            raise
        write_result(log, Result(result if isinstance(result, int) else 0))
        self.scheduler.on_result(environment, result)
        return result

    def _place(self, environment: Any) -> Place:
        """Read the process's place from submitit's JobEnvironment."""
        address, port = self.scheduler.rendezvous(environment, self.port)
        return Place(
            rank=environment.global_rank,
            local_rank=environment.local_rank,
            world_size=environment.num_tasks,
            local_world_size=environment.num_tasks // environment.num_nodes,
            master_addr=address,
            master_port=port,
        )


@dataclass(frozen=True)
class Train:
    """Train by the resolved config that was saved at submission."""

    config_path: str

    def __call__(self) -> int:
        """Join the process group and train; return the exit code."""
        signals.listen()  # before the slow imports: an early signal must not end the job
        from dist_vse import distributed, train
        from dist_vse.config import load_config

        with distributed.process_group():
            with distributed.raise_on_all_ranks():
                config = load_config(self.config_path)
            return train.run(config)


@dataclass(frozen=True)
class Scale:
    """Measure steps of the resolved config, as `dist-vse bench scale` does, and train nothing."""

    config_path: str
    vary: tuple[str, ...]
    """Settings to measure besides: `key=value,value`."""
    out: str
    """The file to write the numbers to."""

    def __call__(self) -> int:
        """Measure on all ranks of the job; return the exit code."""
        from dist_vse.tools.bench import cli

        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        varied = ["--vary", *self.vary] if self.vary else []
        words = ["scale", self.config_path, *varied, "--out", self.out]
        return cli.run(parser.parse_args(words))


def enter(place: Place, env: Mapping[str, str]) -> None:
    """Set this process's variables, remove what would contradict them, and log the changes."""
    wanted = {**env, **place.variables()}
    several_nodes = place.world_size > place.local_world_size
    found = conflicts(os.environ, wanted, several_nodes=several_nodes)
    for conflict in found:
        if conflict.removed:
            del os.environ[conflict.name]
    os.environ.update(wanted)
    setup_logging()
    for conflict in found:
        logger.info("inherited %s", conflict)
