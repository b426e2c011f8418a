"""Checkpoints: the only file that knows Orbax.

A checkpoint is one atomic step: the whole training state, and a checksum of every leaf of it. The position in the
data is the step itself (`nqf.pipelines.datasets.TrainingData.iterate`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from nqf.training.mesh import leaf_name

CHECKSUM = "checksum"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, not written or does not fit; the message names folder and leaves."""


@dataclasses.dataclass
class _NewestAndBest:
    """Which checkpoints stay.

    Attributes:
      keep: How many of the newest.
      best: Step of the one that stays whatever its age.
    """

    keep: int
    best: int = -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        newest = len(checkpoints) - max(self.keep, 1)
        return [index >= newest or checkpoint.step == self.best for index, checkpoint in enumerate(checkpoints)]


class Checkpointer:
    """Saves and restores one stage's checkpoints. Use as a context manager: leaving it waits for pending saves.

    Args:
      directory: Folder of the checkpoints, made if missing.
      keep: Newest checkpoints kept beside the best one.
    """

    def __init__(self, directory: Path, *, keep: int = 1) -> None:
        self._directory = directory.resolve()
        self._policy = _NewestAndBest(keep)
        self._checkpointer = ocp.training.Checkpointer(
            str(self._directory), preservation_policy=self._policy, cleanup_tmp_directories=True
        )
        self._saving: Any = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Errors of asynchronous saves surface here and nowhere else, so they are swallowed only by an earlier error.
        try:
            self._checkpointer.close()
        except Exception as error:
            if kind is None:
                raise self._not_saved(error) from error

    def wait(self) -> None:
        """Waits until the checkpoint that is being saved is whole.

        Raises:
          CheckpointError: It could not be written.
        """
        try:
            if self._saving is not None:
                self._saving.result()
        except Exception as error:
            raise self._not_saved(error) from error

    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, *, best_step: int) -> None:
        """Starts an asynchronous save; waits for the one before.

        Args:
          step: Name of the checkpoint.
          state: Tree of arrays.
          best_step: The checkpoint that is kept whatever its age.

        Raises:
          CheckpointError: This or the previous save failed.
        """
        self._policy.best = best_step
        try:
            # One tree: where a save has two, the barriers of both have one name in orbax 0.12.8
            # (PyTreeHandler._finalize), and one process can meet another at the wrong one.
            tree = {**_parts(state), CHECKSUM: checksums(state)}
            self._saving = self._checkpointer.save_checkpointables_async(step, {"state": tree}, force=True)
        except Exception as error:
            raise self._not_saved(error) from error

    def restore(self, step: int, state: Any, *, copied: Mapping[str, str] = MappingProxyType({})) -> Any:
        """Restores a step into the shapes, dtypes and shardings of `state`, whatever devices wrote it.

        Args:
          step: Name of the checkpoint.
          state: A dictionary or a dataclass of trees of arrays.
          copied: Fields of a dataclass that are copies of other ones where the checkpoint is of a version without them.

        Raises:
          CheckpointError: The checkpoint is damaged, or its leaves differ from `state`'s.
        """
        path = self._directory / str(step)
        stored = _described(path)
        new = {name: source for name, source in copied.items() if name in _parts(state) and name not in stored}
        read = _read(path, stored, dataclasses.replace(state, **dict.fromkeys(new)) if new else state)
        # Copies, as a state that holds the same buffer twice cannot be donated.
        made = {name: jax.tree.map(jnp.copy, getattr(read, source)) for name, source in new.items()}
        return dataclasses.replace(read, **made) if made else read

    def _not_saved(self, error: Exception) -> CheckpointError:
        whole = sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())
        left = f"the checkpoint of step {whole[-1]} is whole" if whole else "there is no earlier one"
        return CheckpointError(
            f"{self._directory}: a checkpoint could not be written ({_first_line(error)}); {left}. Make room or fix "
            "the folder's permissions, then run the same command again"
        )


def restore_params(directory: Path, step: int, params: Any, *, zero: Collection[str] = ()) -> Any:
    """Restores the parameters of one step and nothing else, for this process alone.

    Of several processes, all have to call it: Orbax names the barriers of later saves by the number of operations
    before, and processes that count differently wait for each other for ever.

    Args:
      directory: Folder of a stage's checkpoints.
      step: Which checkpoint.
      params: Tree of arrays or `jax.ShapeDtypeStruct` with the expected names and shapes.
      zero: Names of leaves that are zero where the checkpoint is of a version that did not have them.

    Raises:
      CheckpointError: No such checkpoint, a damaged one, or its leaves differ from `params`.
    """
    path = directory.resolve() / str(step)
    if not path.is_dir():
        raise CheckpointError(f"{path.parent}: no checkpoint of step {step}; run the stage again")
    context = ocp.Context()
    # Without this, Orbax waits for the other processes of a multi-process run.
    context.multiprocessing_options.active_processes = {jax.process_index()}
    context.multiprocessing_options.primary_host = jax.process_index()
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None)
        usable = sharding is not None and sharding.is_fully_addressable
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if usable else device)

    with context:
        stored = _described(path)
        new = {name for name in zero if f"params/{name}" not in _named(stored)}
        if not new:
            return _read(path, stored, {"params": jax.tree.map(leaf, params)})["params"]
        leaves: dict[str, Any] = flatten_dict(params, sep="/")
        absent = {name: jnp.zeros(x.shape, x.dtype) for name, x in leaves.items() if name in new}
        known = {name: leaf(x) for name, x in leaves.items() if name not in new}
        read = _read(path, stored, {"params": unflatten_dict(known, sep="/")})["params"]
        return unflatten_dict(flatten_dict(read, sep="/") | absent, sep="/")


def checksums(tree: Any) -> jax.Array:
    """A checksum of every leaf, in the order of their names: uint32, the sum of its bits times odd weights by position.

    Sums of integers modulo 2^32 do not depend on their order, so the devices that hold a leaf do not matter. Odd
    weights make every change of a single element show. All sums are one array, as Orbax takes its time over each.
    """
    leaves = _named(_parts(tree))
    ordered = [leaves[name] for name in sorted(leaves)]
    if all(_in_memory(leaf) for leaf in ordered):
        return jnp.asarray(np.array([_sum_of_bits(np.asarray(leaf)) for leaf in ordered], np.uint32))
    return _sums_on_devices(ordered)


def _in_memory(leaf: Any) -> bool:
    """Whether numpy can read an array where it is; compiling a program for it would take longer than the sums."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
STRIDE = np.uint32(2_654_435_762)
"""Between the weights of two elements: 2^32 by the golden ratio, as in Fibonacci hashing, made even."""
CHUNK = 1 << 20
"""Elements that are summed at a time on the host."""


def _sum_of_bits(x: np.ndarray) -> int:
    bits, total = np.ascontiguousarray(x).reshape(-1).view(UNSIGNED[x.dtype.itemsize]), 0
    for start in range(0, bits.size, CHUNK):
        part = bits[start : start + CHUNK].astype(np.uint32)
        places = np.arange(part.size, dtype=np.uint32) + np.uint32(start % 2**32)
        total += int((part * (places * STRIDE + np.uint32(1))).sum(dtype=np.uint32))
    return total % 2**32


@jax.jit
def _sums_on_devices(leaves: list[jax.Array]) -> jax.Array:
    def total(x: jax.Array) -> jax.Array:
        unsigned = UNSIGNED[x.dtype.itemsize]
        bits = x.astype(unsigned) if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
        weights = jax.lax.broadcasted_iota(jnp.uint32, (x.size,), 0) * STRIDE + jnp.uint32(1)
        return jnp.sum(bits.astype(jnp.uint32).reshape(-1) * weights, dtype=jnp.uint32)

    return jnp.stack([total(leaf) for leaf in leaves])


def _named(tree: Any) -> dict[str, Any]:
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _parts(state: Any) -> dict[str, Any]:
    """The top level of a tree, which is a dictionary or a dataclass, without what is None."""
    if isinstance(state, dict):
        return state
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: part for name, part in parts.items() if part is not None}


def _read(path: Path, stored: dict[str, Any], wanted: Any) -> Any:
    """Reads a checkpoint, described by `stored`, into the names, shapes, dtypes and shardings of `wanted`.

    If that is a dictionary, what else the checkpoint holds is left unread.
    """
    # Checkpoints of before checksums have none.
    summed, stored = CHECKSUM in stored, {name: tree for name, tree in stored.items() if name != CHECKSUM}
    names, parts, unread = sorted(_named(stored)), _parts(wanted), {}
    if isinstance(wanted, dict):
        unread = {
            name: jax.tree.map(lambda _: ocp.PLACEHOLDER, tree) for name, tree in stored.items() if name not in parts
        }
    _check_leaves(path, {name: tree for name, tree in stored.items() if name not in unread}, parts)
    # Without shardings a checkpoint written on eight devices does not load on one.
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts)
    sums = {}
    if summed:
        whole = _replicated(jax.tree.leaves(abstract)[0].sharding)
        sums[CHECKSUM] = jax.ShapeDtypeStruct((len(names),), jnp.uint32, sharding=whole)
    try:
        loaded = ocp.load_checkpointables(str(path), {"state": {**abstract, **unread, **sums}})["state"]
        read = {name: loaded[name] for name in parts}
    except Exception as error:
        raise _damaged(path, _first_line(error)) from error
    if summed:
        expected = dict(zip(names, jax.device_get(loaded[CHECKSUM]), strict=True))
        found = zip(sorted(_named(read)), jax.device_get(checksums(read)), strict=True)
        differing = [name for name, value in found if value != expected[name]]
        if differing:
            raise _damaged(path, f"the checksum of {', '.join(differing[:5])} differs")
    return read if isinstance(wanted, dict) else dataclasses.replace(wanted, **read)


def _described(path: Path) -> dict[str, Any]:
    """Names, shapes and types of a checkpoint's arrays."""
    try:
        stored = ocp.metadata(str(path), "state").metadata
    except Exception as error:
        # Damaged files may raise anything that readers of JSON, protobuf and tensorstore can.
        raise _damaged(path, _first_line(error)) from error
    if not isinstance(stored, dict):
        raise _damaged(path, "the description of its arrays cannot be read")
    return stored


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged ({reason}); delete this folder to resume from an earlier checkpoint, if there is one, or "
        "begin the stage again with --restart"
    )


def _first_line(error: Exception) -> str:
    # Orbax hides the cause behind a message of its own; tensorstore's messages run over many lines.
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no reason given'}"


def _replicated(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


def _check_leaves(path: Path, stored: Any, wanted: Any) -> None:
    """Compares names and shapes first: Orbax's own message for a mismatch hides the cause."""

    def shapes(tree: Any) -> dict[str, tuple[Any, ...]]:
        return {name: tuple(getattr(leaf, "shape", ("no array",))) for name, leaf in _named(tree).items()}

    there, here = shapes(stored), shapes(wanted)
    lines = [f"  {name}: stored {there.get(name, 'nothing')}, expected {here.get(name, 'nothing')}"
             for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]  # fmt: skip
    if lines:
        shown = "\n".join(lines[:12]) + (f"\n  and {len(lines) - 12} more" if len(lines) > 12 else "")
        raise CheckpointError(f"{path}: the checkpoint does not fit the configuration:\n{shown}")
