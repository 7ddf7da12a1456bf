"""The option by which a user consents to run commands that a data set names."""

import argparse


def add_allow_pipe(parser: argparse.ArgumentParser) -> None:
    """Add `--allow-pipe`; what a file says is no consent."""
    parser.add_argument(
        "--allow-pipe",
        action="store_true",
        help="run the commands (pipe:COMMAND) that the data set's files name as shards",
    )
