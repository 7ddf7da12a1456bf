"""The names in a run's folder, and its files of one JSON line a step."""

import json
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.files import atomic_write
from dist_vse.common.reading import BadFileError, is_count, json_lines

CONFIG_NAME = "config.yaml"  # the whole resolved config
VOCABULARY_NAME = "vocabulary.json"  # of text encoders from scratch
METRICS_NAME = "metrics.jsonl"  # one line for each log step and each evaluation
SKIPPED_NAME = "skipped.jsonl"  # one line for each bad sample that training skipped
EXAMPLES_NAME = "examples.json"  # queries with their best results, for the report
RESULT_NAME = "eval-{split}.json"  # what `dist-vse eval` measured
SCALE_NAME = "scale.json"  # what `dist-vse submit --scale` measured
CHECKPOINTS = "checkpoints"
TRACE_NAME = "profile.json"  # what `profile=true` writes
ENVIRONMENT_NAME = "environment.jsonl"  # versions, machine and data of each attempt
LEASE_NAME = "lease.json"  # which attempt may write


def drop_lines_after(path: Path, step: int) -> None:
    """Remove what an earlier attempt wrote after the step from which this one goes on.

    A damaged line goes too, as the last one of a killed run, which may be cut short. The file is
    read as a stream. Raises UserError if it can't be read.
    """
    if not path.exists():
        return
    try:
        # By one rename: a kill must not lose the history.
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for _, record in json_lines(path):
                if is_count(record.get("step")) and record["step"] <= step:
                    file.write(json.dumps(record) + "\n")
    except BadFileError as error:
        raise UserError(f"{path}: can't be read ({error})") from error
