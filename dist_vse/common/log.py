"""One logger for all modules: rank 0 prints plain lines, the other ranks only warnings."""

import logging
import os
import sys

from tqdm import tqdm

from dist_vse.common.terminal import printable, without_secrets

logger = logging.getLogger("dist_vse")


class _Handler(logging.Handler):
    """Writes above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(without_secrets(self.format(record))), file=sys.stderr)


def setup_logging() -> None:
    """Send the log to standard error; call once, at the start of a command."""
    rank = int(os.environ.get("RANK", "0"))
    handler = _Handler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(prefix + "%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
