"""`python -m nqf.ablate STUDY`: trains every variant of a study and writes its table, which nobody types by hand."""

import sys

from nqf.cli import guard
from nqf.tools.ablate import AblateArguments, load_study, main

__all__ = ["AblateArguments", "load_study", "main"]

if __name__ == "__main__":
    guard(main, sys.argv[1:])
