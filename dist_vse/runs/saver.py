"""Saving in the background: training stops for a copy to host memory, a thread writes the files."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dist_vse import distributed
from dist_vse.common.errors import UserError, writing
from dist_vse.engine import RunEngine
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import FileDigests, Progress
from dist_vse.runs.lease import Lease


@dataclass(frozen=True)
class _Pending:
    """A checkpoint whose files are being written."""

    progress: Progress
    temporary: Path
    publish: Callable[[FileDigests], None]
    writing: "Future[FileDigests]"


class Saver:
    """Writes the run's checkpoints; every rank has one and calls it at the same steps."""

    def __init__(
        self, folder: Path, lease: Lease, *, keep_last: int, keep_best: int, minutes: float
    ) -> None:
        self.folder = folder
        self.lease = lease
        self.keep_last, self.keep_best, self.minutes = keep_last, keep_best, minutes
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._last = time.monotonic()
        self._ending = f".attempt-{lease.attempt}-{lease.token}{checkpoint.TEMPORARY}"
        if distributed.is_main_process():
            # Not of this attempt: another of its ranks may be writing already.
            for leftover in folder.glob(f"*{checkpoint.TEMPORARY}"):
                if not leftover.name.endswith(self._ending):
                    shutil.rmtree(leftover, ignore_errors=True)

    @property
    def writing(self) -> bool:
        """Return whether this rank's files are still being written."""
        return self._pending is not None and not self._pending.writing.done()

    @property
    def overdue(self) -> bool:
        """Return whether the last checkpoint is older than it should be by the clock."""
        return self.minutes > 0 and time.monotonic() - self._last >= 60 * self.minutes

    def start(self, engine: RunEngine, progress: Progress, *, score: float | None) -> None:
        """Copy the state and begin to write it; the checkpoint appears with `settle`.

        Raises UserError if the previous checkpoint could not be written.
        """
        self.finish()
        final = self.folder / f"step-{progress.step:06d}"
        temporary = self.folder / f"{final.name}{self._ending}"
        world_size, stage, attempt = distributed.world_size(), engine.stage, self.lease.attempt
        digest = getattr(engine.module, "base_digest", None)

        def publish(digests: FileDigests) -> None:
            more = {
                "world_size": world_size,
                "zero_stage": stage,
                "score": score,
                "attempt": attempt,
                **({"base": digest} if digest is not None else {}),
            }
            checkpoint.write_manifest(temporary, progress, digests, **more)
            self.lease.check()  # as late as possible: a lost node may hang in what comes before
            checkpoint.publish(temporary, final)
            checkpoint.prune(self.folder, keep_last=self.keep_last, keep_best=self.keep_best)

        files = checkpoint.snapshot(engine)
        writing = self._writer.submit(checkpoint.write_files, temporary, files)
        self._pending = _Pending(progress, temporary, publish, writing)
        self._last = time.monotonic()

    def settle(self, *, writing: bool) -> None:
        """Publish what was written, unless `writing`: whether any rank, as all of them know, is."""
        if self._pending is not None and not writing:
            self.finish()

    def finish(self) -> None:
        """Wait until all ranks have written, and publish the checkpoint; every rank calls this.

        Raises on every rank: UserError if one can't write (a full disk), LostLease if a later
        attempt has taken the run over.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        digests: FileDigests = {}
        try:
            with distributed.raise_on_all_ranks(), writing(self.folder):
                digests = self._written(pending)
            parts = distributed.all_gather_object(digests)
            with distributed.raise_on_all_ranks(), writing(self.folder):
                if distributed.is_main_process():
                    pending.publish({name: r for part in parts for name, r in part.items()})
        except UserError:
            if distributed.is_main_process():
                shutil.rmtree(pending.temporary, ignore_errors=True)
            raise

    def _written(self, pending: _Pending) -> FileDigests:
        """Wait for this rank's files. Raises OSError, or LostLease if another attempt is why."""
        try:
            return pending.writing.result()
        except OSError:
            self.lease.check()  # another attempt removes the folder in which we write
            raise
