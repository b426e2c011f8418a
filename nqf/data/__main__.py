"""`python -m nqf.data`: fetch public data by name, and look at tables before training."""

import sys

from nqf.cli import guard
from nqf.tools.data import main

if __name__ == "__main__":
    guard(main, sys.argv[1:])
