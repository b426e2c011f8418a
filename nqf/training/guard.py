"""The numerical guard: what a stage does when a loss or a gradient is not finite.

The compiled step leaves parameters and optimizer as they were and counts (`nqf.training.loop.make_train_step`); the
host learns of it when it fetches metrics anyway, and writes down the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nqf import files
from nqf.pipelines.datasets import TrainingData
from nqf.training.mesh import leaf_name


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not finite; names stage, step and the file with the batch."""


def refuse_batch(
    folder: Path,
    stage: str,
    step: int,
    data: TrainingData,
    *,
    allowed: int,
    ids: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
) -> NonFiniteError:
    """Writes the batch of a step for replay and returns the error to raise.

    `non-finite-<step>.npz` holds the batch as the step saw it, leaf by leaf, and the ids of its users and items.

    Args:
      folder: Run folder.
      stage: Name of the stage.
      step: The step, counted from 1.
      data: The stage's batches.
      allowed: How many such batches `training.skip_non_finite` admits.
      ids: Names rows of users and of items.
    """
    batch = data.batches[step - 1]
    assert batch is not None, "a step was made of it"
    arrays: dict[str, Any] = {
        leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    users = data.users[data.examples[step - 1]]
    items = np.unique(batch.items())
    arrays |= ids(users, items[items >= 0])
    path = folder / stage / f"non-finite-{step}.npz"
    with files.whole(path) as file:
        np.savez(file, step=step, **arrays)
    if allowed:
        count = f"{allowed + 1} batches had a non-finite loss or gradient, the last at step {step}"
    else:
        count = f"the loss or its gradient is not finite at step {step}"
    return NonFiniteError(
        f"stage {stage}: {count}; its {len(users)} examples are in {path}. Nothing was learned from it, and the "
        f"checkpoints are those from before. Lower {stage}.optim.learning_rate, fix values out of range, or set "
        "training.skip_non_finite to leave such batches out"
    )
