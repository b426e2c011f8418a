"""Checkpoints: the only file that knows Orbax.

A checkpoint holds the training state and the position of the data iterator in one atomic step. The newest ones and
the best one are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or does not fit; the message names the folder and the differing leaves."""


class Checkpointer:
    """Saves and restores one stage's checkpoints. Use as a context manager: leaving it waits for pending saves.

    Args:
      directory: Folder of the checkpoints, made if missing.
      keep: Newest checkpoints kept beside the best one.
    """

    def __init__(self, directory: Path, *, keep: int = 1) -> None:
        self._directory = directory.resolve()
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(max(keep, 1)),
                    policies.BestN(get_metric_fn=lambda metrics: metrics["score"], n=1),
                ]
            ),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        # Errors of asynchronous saves surface here and nowhere else, so nothing is swallowed.
        self._checkpointer.close()

    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, data: Any, *, score: float) -> None:
        """Starts an asynchronous save of `state` and the data iterator; `score` decides which one is best."""
        self._checkpointer.save_checkpointables_async(
            step, {"state": state, "data": data}, metrics={"score": float(score)}, force=True
        )

    def restore(self, step: int, state: Any, data: Any) -> Any:
        """Restores a step into the shapes, dtypes and shardings of `state`; moves the iterator `data` in place.

        Raises:
          CheckpointError: The checkpoint's leaves differ from `state`'s.
        """
        _check_leaves(self._directory, self._checkpointer.checkpointables_metadata(step).metadata["state"], state)
        return self._checkpointer.load_checkpointables(step, {"state": _abstract(state), "data": data})["state"]


def restore_params(directory: Path, step: int, params: Any) -> Any:
    """Restores the parameters of one step and nothing else.

    Args:
      directory: Folder of a stage's checkpoints.
      step: Which checkpoint.
      params: Tree of arrays or `jax.ShapeDtypeStruct` with the expected names and shapes.

    Raises:
      CheckpointError: No such checkpoint, or its leaves differ from `params`.
    """
    directory = directory.resolve()
    with ocp.training.Checkpointer(directory) as checkpointer:
        if step not in [checkpoint.step for checkpoint in checkpointer.checkpoints]:
            raise CheckpointError(f"{directory}: no checkpoint of step {step}; run the stage again")
        stored = checkpointer.checkpointables_metadata(step).metadata["state"]
        _check_leaves(directory, {"params": stored["params"]}, {"params": params})
        wanted = jax.tree.map(lambda _: ocp.PLACEHOLDER, stored)
        wanted["params"] = _abstract(params)
        return checkpointer.load_checkpointables(step, {"state": wanted})["state"]["params"]


def _abstract(tree: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or sharding)

    # Without shardings a checkpoint written on eight devices does not load on one.
    return jax.tree.map(leaf, tree)


def _check_leaves(directory: Path, stored: Any, wanted: Any) -> None:
    """Compares names and shapes first: Orbax's own message for a mismatch hides the cause."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {"/".join(_key(part) for part in path): tuple(leaf.shape) for path, leaf in leaves}

    there, here = shapes(stored), shapes(wanted)
    if there == here:
        return
    lines = [f"  {name}: stored {there.get(name, 'nothing')}, expected {here.get(name, 'nothing')}"
             for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]  # fmt: skip
    shown = "\n".join(lines[:12]) + (f"\n  and {len(lines) - 12} more" if len(lines) > 12 else "")
    raise CheckpointError(f"{directory}: the checkpoint does not fit the configuration:\n{shown}")


def _key(part: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)
