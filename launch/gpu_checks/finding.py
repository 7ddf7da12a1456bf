"""What a check is given, and what it returns."""

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """What every rank of a check is given."""

    number: int
    on_gpu: bool
    folder: str
    """For files; it is removed after the check."""
    ends: float
    """When the check is ended, by `time.monotonic`, which all processes share."""
    warm_up: bool = False
    """Only compile what the check will run."""
    config: str | None = None
    """A run's config; without one the checks of a step take a reference model."""
    overrides: list[str] = field(default_factory=list)
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Figures of the checks that ran before, by number."""
    warmed: dict[str, Any] = field(default_factory=dict)
    """Figures of what compiled before this check."""

    def left_s(self) -> float:
        """Return the seconds that are left."""
        return self.ends - time.monotonic()

    def earlier_figure(self, number: int, name: str) -> float | None:
        """Return a figure of an earlier check, None where it has not run or has none."""
        found = self.earlier.get(str(number), {}).get(name)
        return None if found is None else float(found)


@dataclass(frozen=True)
class Finding:
    """What a check found; of several ranks rank 0's counts."""

    ok: bool
    words: str
    """One line."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Numbers and texts, for the JSON."""
