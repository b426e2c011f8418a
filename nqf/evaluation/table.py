"""Tables for the terminal: with rules on a terminal, plain lines elsewhere, never wider than the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

Cells = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows. A line break in a header stands where it may be broken."""


def print_table(
    console: Console, choices: Sequence[Cells], *, title: str = "", caption: str = "", left: Sequence[int] = (0,)
) -> int:
    """Prints the first choice that fits the console's width, or else the last one.

    Args:
      console: Where to print; what is no terminal has 80 columns unless the environment's COLUMNS says otherwise.
      choices: The same table with less and less detail, so that nothing has to be cut off in the middle.
      title: Line above the table.
      caption: Line below the table.
      left: Columns that are aligned to the left; numbers belong to the right.

    Returns:
      Index of the choice.
    """
    at = next((at for at, cells in enumerate(choices) if _width(cells) <= console.width), len(choices) - 1)
    header, rows = choices[at]
    # Two blanks between columns: the rules of a terminal's table bring one of them.
    rules, blanks = (box.SIMPLE_HEAD, 1) if console.is_terminal else (None, 2)
    table = Table(box=rules, pad_edge=False, padding=(0, blanks, 0, 0))
    for index, name in enumerate(header):
        table.add_column(
            console.render_str(name, markup=False),
            justify="left" if index in left else "right",
            vertical="bottom",
            overflow="fold",
        )
    for row in rows:
        # A cell such as [red] is what it is, not a color.
        table.add_row(*(console.render_str(cell, markup=False, emoji=False) for cell in row))
    # A title of the table's own would be folded to the width of a narrow table.
    for line in (title, table, caption):
        if line:
            console.print(line, highlight=False, markup=False)
    return at


def _width(cells: Cells) -> int:
    header, rows = cells
    widths = [max(map(cell_len, name.split("\n"))) for name in header]
    for row in rows:
        widths = [max(width, cell_len(cell)) for width, cell in zip(widths, row, strict=True)]
    # Two blanks behind every column and one before the first.
    return sum(widths) + 2 * len(widths) + 1
