"""What the joint stage begins with."""

from pathlib import Path

import numpy as np

from nqf.stages.joint import init_joint, joint_parts, start_joint
from nqf.stages.rank import ranker_of
from nqf.stages.run import open_run
from nqf.stages.user import load_users


def test_ranking_begins_as_the_user_stage_ended(tiny_run: Path) -> None:
    run = open_run(tiny_run)
    parts, width = joint_parts(run), run.config.candidates.width
    variables = parts.variables(start_joint(run, init_joint(run, parts)))
    cases, which = run.dataset.split.valid, np.arange(40)
    users = load_users(run)
    # All but the frozen similarity, whose weight is read from the language model's state.
    found, wanted = (
        ranker.encode_cases(variables, run.dataset.interactions, run.features, cases, which)[:, :width]
        for ranker, variables in ((ranker_of(run, parts), variables), (users.ranker, users.variables))
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(found[1:] - found[:-1]).max() > 0.1
    items = ranker_of(run, parts).item_vectors(variables)[:, :width]
    np.testing.assert_allclose(items, users.ranker.item_vectors(users.variables)[:, :width], atol=1e-5)
