"""`python -m nqf`: the command `nqf`."""

from nqf.cli import main

if __name__ == "__main__":
    main()
