"""What a stage hands to `fit`: its real loss, parameters, frozen tree and data, for tests of the step itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nqf.stages.graph import stage_of
from nqf.stages.run import open_run


def arguments_of_fit(run: Path, stage: str) -> dict[str, Any]:
    """Loss, fresh parameters, frozen tree and data with which a stage of a finished run trains."""
    program = stage_of(stage).program(open_run(run), False)
    return {
        "loss_fn": program.loss_fn,
        "params": program.start(program.init()),
        "frozen": program.frozen(),
        "data": program.data(program.optim),
        "optim": program.optim,
    }
