"""How many bad samples a run may skip."""

import math
from dataclasses import dataclass
from fractions import Fraction

from dist_vse.common.errors import UserError


@dataclass(frozen=True)
class ErrorBudget:
    """A number of samples, or a share of all."""

    text: str  # as the user gave it
    count: int = 0
    share: Fraction | None = None

    def allowed(self, num_samples: int) -> int:
        """Return how many of `num_samples` samples may be bad."""
        if self.share is None:
            return self.count
        return math.floor(self.share * num_samples)  # exact, as 0.29 is not


def parse_error_budget(text: str) -> ErrorBudget:
    """Read a count, or a share such as 0.1%.

    Raises UserError for anything else.
    """
    try:
        if text.endswith("%"):
            budget = ErrorBudget(text, share=Fraction(text[:-1]) / 100)
        else:
            budget = ErrorBudget(text, count=int(text))
        if budget.allowed(100) >= 0 and (budget.share or 0) <= 1:
            return budget
    except (ValueError, ZeroDivisionError):
        pass
    raise UserError(f"--max-bad {text!r}: give a number of samples, or a share such as 0.1%")
