"""How much code there is, as benchmarks/size.py counts it: functions are short, or a comment says why not."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIZE = runpy.run_path(str(ROOT / "benchmarks" / "size.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "nqf").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_or_say_why_not(path: Path) -> None:
    assert not SIZE["excessive"](path)


def test_lines_of_code_are_counted_without_comments_docstrings_and_blank_lines() -> None:
    source = '''"""A module."""

import os  # Imports count.


def function(value):
    """Does it.

    At length.
    """
    # Why.
    text = """two
    lines"""
    return text, value


CONSTANT = 1
"""What it is."""
'''
    assert SIZE["code_lines"](source) == {3, 6, 12, 13, 14, 17}
