"""The run's README.md: a model card generated from what the stages and the evaluation of the test split wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from markupsafe import Markup

from nqf.config import to_tree
from nqf.evaluation.results import Results, markdown_table
from nqf.files import write_text
from nqf.stages.artifacts import differences
from nqf.stages.folder import claim, owned
from nqf.stages.graph import NAMES
from nqf.stages.records import read_artifact
from nqf.stages.run import Run
from nqf.tools.templates import code_span, markdown


def write_card(run: Run, results: Results) -> None:
    """Writes README.md in the run folder; where somebody wrote one of their own, `eval/card.md`.

    Results of another split than test leave the card as it is.
    """
    if results.split != "test":
        return
    path = run.folder / "README.md"
    if path.exists() and path.name not in owned(run.folder):
        path = run.folder / "eval" / "card.md"
        run.console.print(f"README.md is not nqf's and stays; the model card is {path}", highlight=False, markup=False)
    else:
        claim(run.folder, path.name)
    write_text(path, _card(run, results))


def _card(run: Run, results: Results) -> str:
    config = run.config
    artifacts = {stage: read_artifact(run.folder, stage) for stage in NAMES}
    stages = {stage: artifact.result for stage, artifact in artifacts.items() if artifact is not None}
    changed = differences(to_tree(type(config)()), to_tree(config))
    # The table puts the command between backticks.
    command = str(code_span(results.provenance["command"])).strip("` ").replace("`", "'")
    results = dataclasses.replace(results, provenance=results.provenance | {"command": command})
    return markdown(
        Path(__file__).with_name("card.md.j2"),
        config=config,
        backbone=config.joint.backbone.path or "a small Qwen3 trained from scratch",
        results=results,
        table=Markup(markdown_table(results)),
        warnings=run.dataset.split.warnings,
        item=stages.get("item"),
        stages=stages,
        changed=[line for line in changed if not line.startswith("data.")],
        report={name: value for name, value in run.dataset.report.items() if isinstance(value, (int, float, str))},
    )
