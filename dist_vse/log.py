"""One logger for all modules: rank 0 prints plain lines, the other ranks only warnings."""

import logging
import os
import sys

logger = logging.getLogger("dist_vse")


def setup_logging() -> None:
    """Send the log to standard error; call once, at the start of a command."""
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(prefix + "%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
