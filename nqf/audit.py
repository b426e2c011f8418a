"""`python -m nqf.audit`: looks for leaks in a configuration's data before anything is trained on it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nqf.cli import configuration, guard, parse, program, terminal
from nqf.config import load_config, section

if TYPE_CHECKING:
    from rich.console import Console

    from nqf.tools.audit import Audit

LEAK = 3
"""Exit status; 1 is an error and 2 a wrong option."""
_COLORS = {"leak": "bold red", "note": "yellow", "clean": "green", "accepted": "yellow"}


@section
class AuditArguments:
    """Audits the data of a configuration. Exit status: 0 clean, 3 a leak, 1 an error, 2 a wrong option.

    Attributes:
      config: YAML file of the configuration, or name of a shipped one.
      accept: Checks whose leak is known and accepted, as `split` for leave-one-out results that are compared with
        published ones; such a leak is shown and does not change the exit status.
      debug: Show the traceback of an error.
    """

    config: Annotated[Path, tyro.conf.Positional]
    accept: tuple[Literal["split", "ties", "repeats", "duplicates", "candidates", "future fields"], ...] = ()
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(AuditArguments, arguments, prog=program("audit"))
    data = load_config(configuration(options.config)).data
    import tempfile

    from nqf.data import addresses
    from nqf.data.load import prepare
    from nqf.data.unirec import read_samples, test_file
    from nqf.tools.audit import audit

    console = terminal()
    samples = []
    if data.format == "unirec":
        given = {"train": data.interactions}
        with tempfile.TemporaryDirectory() as folder, addresses.local(given, Path(folder), data.format) as (paths, _):
            train = Path(paths["train"])
            samples = [sample for path in sorted({train, test_file(train)}) for sample in read_samples(path)]
    with tempfile.TemporaryDirectory() as folder:
        # With the fields that are known only after the fact: they are judged, whether they are used or not.
        dataset = prepare(dataclasses.replace(data, use_after_the_fact=True), Path(folder) / "data")
        fields = dataset.catalogue.schema.fields
        unused = [field.name for field in fields if field.after_the_fact and not data.use_after_the_fact]
        result = audit(dataset, unused=unused, samples=samples, seed=data.seed)
    leaks = _print(result, options.accept, console)
    if leaks:
        console.print(f"[bold red]leak[/bold red] found by: {', '.join(leaks)}")
        raise SystemExit(LEAK)
    console.print(f"[green]clean[/green]: no leak found{' beside what is accepted' if options.accept else ''}")


def _print(result: Audit, accept: tuple[str, ...], console: Console) -> list[str]:
    """Prints the tables and findings; returns the checks that found a leak that is not accepted."""
    from rich.table import Table
    from rich.text import Text

    from nqf.evaluation.table import print_table

    for fact in result.facts:
        console.print(fact, markup=False, emoji=False)
    console.print()
    filled = result.fields.columns.index("filled")
    full = [
        [f"{value:.1%}" if at == filled else _text(value) for at, value in enumerate(row)]
        for row in result.fields.rows()
    ]
    narrow = [row[:5] for row in full]
    print_table(
        console, [(result.fields.columns, full), (result.fields.columns[:5], narrow)], title="Fields", left=(0, 1, 2, 5)
    )
    console.print()
    print_table(console, [(result.counts.columns, [[_text(value) for value in row] for row in result.counts.rows()])])
    console.print()
    grid, leaks = Table.grid(padding=(0, 2)), []
    for finding in result.findings:
        verdict = "accepted" if finding.verdict == "leak" and finding.check in accept else finding.verdict
        if verdict == "leak" and finding.check not in leaks:
            leaks.append(finding.check)
        # Not markup: the text holds ids and names of the data.
        said = console.render_str(finding.text, markup=False, emoji=False, highlight=False)
        grid.add_row(Text(verdict, _COLORS[verdict]), finding.check, said)
        if not console.is_terminal:
            console.print(f"{verdict}  {finding.check}: {finding.text}", markup=False, emoji=False)
    if console.is_terminal:
        console.print(grid)
    return leaks


def _text(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    guard(main, sys.argv[1:])
