"""`python -m nqf.report RUN`: one HTML page about a run: results, curves, reconstruction, a map of the items, users."""

import sys

from nqf.cli import guard
from nqf.tools.report.command import ReportArguments, main

__all__ = ["ReportArguments", "main"]

if __name__ == "__main__":
    guard(main, sys.argv[1:])
