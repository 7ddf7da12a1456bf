"""The report of a run, or of several side by side: one self-contained HTML page."""

from dist_vse.tools.report.compare import write_comparison
from dist_vse.tools.report.page import write_report

__all__ = ["write_comparison", "write_report"]
