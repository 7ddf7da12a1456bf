"""The report of a run, or of several side by side: one self-contained HTML page."""

from dist_vse.tools.report.compare import write_comparison
from dist_vse.tools.report.page import write_report
from dist_vse.tools.report.watch import watch_run

__all__ = ["watch_run", "write_comparison", "write_report"]
