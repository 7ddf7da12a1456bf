"""A benchmark's result: its figures, its tables, and what it was measured on, as one JSON file."""

import datetime
import json
import os
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dist_vse.common.files import atomic_output
from dist_vse.runs.environment import describe_environment
from dist_vse.tools.bench.table import Table

PEERS = (
    *("open_clip_torch", "sentence-transformers", "gradcache"),
    *("simplejpeg", "opencv-python-headless"),
)
KEPT = ("title", "notes")  # written by a person; remarks on the figures go with the figures


@dataclass(frozen=True)
class Result:
    """What a benchmark returns."""

    figures: dict[str, Any]
    tables: list[Table]


def write_result(path: Path, benchmark: str, command: str, result: Result) -> None:
    """Write a result with its command, date, machine and versions."""
    content = {
        "benchmark": benchmark,
        **_written_by_hand(path),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "versions": describe_environment()["versions"] | _peer_versions(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "OMP_"))},
        "tables": [asdict(table) for table in result.tables],
        "figures": result.figures,
    }
    with atomic_output(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")


def describe_machine() -> dict[str, Any]:
    """Return the CPU's model, the cores that this process may use, and the GPU, None without."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _written_by_hand(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    old = json.loads(text) if text else {}
    return {key: old[key] for key in KEPT if key in old}


def _peer_versions() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra
    return found
