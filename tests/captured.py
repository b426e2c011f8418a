"""What a stage hands to `fit`: its real loss, parameters, frozen tree and data, for tests of the step itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from nqf.stages import item as item_stage
from nqf.stages import joint as joint_stage
from nqf.stages import user as user_stage
from nqf.stages.run import open_run

_STAGES = {
    "item": (item_stage, item_stage.train_items),
    "user": (user_stage, user_stage.train_users),
    "joint": (joint_stage, joint_stage.train_joint),
}


class _Captured(Exception):
    pass


def arguments_of_fit(run: Path, stage: str) -> dict[str, Any]:
    """The arguments with which a stage of a finished run calls `fit`."""
    module, train = _STAGES[stage]
    with mock.patch.object(module, "fit", side_effect=_Captured) as fit:
        try:
            train(open_run(run))
        except _Captured:
            pass
    return fit.call_args.kwargs
