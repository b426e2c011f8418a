"""The command that writes a run's report."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import tyro

from nqf.cli import parse, program, terminal
from nqf.config import FewOrNone, section


@section
class ReportArguments:
    """Writes a self-contained HTML page about an evaluated run.

    Attributes:
      run: Run folder, or its address (`gs://`, `s3://`, ...).
      output: HTML file; `RUN/report.html` by default.
      users: Number of users that are shown with their history, recommendations and target.
      debug: Show the traceback of an error.
    """

    run: Annotated[str | Path, tyro.conf.Positional]
    output: Path | None = None
    users: FewOrNone = 6
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(ReportArguments, arguments, prog=program("report"))
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("the report needs Matplotlib: pip install 'nqf[viz]'")
    # jax and the stages take seconds to import, which --help and a wrong option should not.
    from nqf.files import masked, write_text
    from nqf.stages.folder import claim
    from nqf.stages.remote import local_run
    from nqf.stages.run import open_run
    from nqf.tools.report.collect import make_page

    console = terminal()
    with local_run(options.run, writes=options.output is None) as (folder, _):
        page = make_page(open_run(folder, console), users=options.users)
        output = options.output or folder / "report.html"
        if options.output is None:
            claim(folder, output.name)
        write_text(output, page)
    name = options.output or f"{masked(str(options.run)).rstrip('/')}/{output.name}"
    console.print(f"wrote {name} ({len(page.encode()) / 2**20:.1f} MiB)", markup=False)
