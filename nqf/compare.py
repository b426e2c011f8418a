"""`python -m nqf.compare RUN RUN ...`: the models of several runs in one table, with paired differences."""

import sys

from nqf.cli import guard
from nqf.tools.compare import CompareArguments, compare, main

__all__ = ["CompareArguments", "compare", "main"]

if __name__ == "__main__":
    guard(main, sys.argv[1:])
