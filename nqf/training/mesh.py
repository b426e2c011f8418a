"""Devices: one mesh, where parameters and batches lie on it, and which part of a batch a process builds.

A layout never changes a result beyond the rounding of sums: every compiled program sees global arrays.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nqf.config import MeshConfig
from nqf.ops.pins import AXES, BATCH_AXES, column_axes

# Logical names of a leaf's last axes by its path; a path that no rule matches is replicated. Kernels that read what
# the layer before them split over `tensor` come first (Megatron-LM, arXiv 1909.08053, section 3).
RULES = (
    (r"(dense|o_proj|down_proj|output)/kernel$", ("hidden", "embed")),
    (r"/kernel$", ("embed", "hidden")),
    # Tables; the last are the values of fields, which stand before their rows.
    (r"(embed_tokens/embedding|/free|/item_embedding|/tables/\w+|/0)$", (None, "columns")),
    (r"/lora_a$", ("embed", None)),
    (r"/lora_b$", (None, "hidden")),
)
MESH_AXIS: dict[str | None, str] = {"embed": "fsdp", "hidden": "tensor"}

# Leaves of a batch that every process holds whole; of all others it builds its rows.
WHOLE = ("rows", "negatives", "supervised")


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  # jax names it by a variable
) -> Mesh:
    """The mesh of some devices, by default all of all processes, with the axes `data`, `fsdp` and `tensor`.

    Auto axes: under jax's default, explicit ones, Linen's embeddings fail.

    Raises:
      ValueError: The sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = config.fsdp * config.tensor
    data = config.data or (max(1, len(devices) // fixed) if fixed > 0 else 0)
    if min(data, config.fsdp, config.tensor) < 1 or data * fixed != len(devices):
        raise ValueError(
            f"training.mesh: data {config.data or 'all that is left'} x fsdp {config.fsdp} x tensor {config.tensor} "
            f"does not make the {len(devices)} devices of this run; fix the sizes, or leave data at 0"
        )
    shape = (data, config.fsdp, config.tensor)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def batch_shard(config: MeshConfig) -> tuple[int, int]:
    """Which of how many equal, consecutive slices of every batch this process builds, (index, count)."""
    mesh = make_mesh(config)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    where = NamedSharding(mesh, PartitionSpec(BATCH_AXES)).addressable_devices_indices_map((rows,))
    starts = {index[0].indices(rows)[0] for index in where.values() if index is not None}
    return min(starts) // len(starts), rows // len(starts)


def leaf_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in a tree as text, `/` between its parts."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def layout(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of parameters, or of anything that holds trees of the same names, such as a train state.

    An axis that its devices do not divide evenly stays whole; tables are split by their columns (`nqf.ops.pins`).
    """

    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf_layout(leaf_name(path), leaf.shape, mesh), tree)


def leaf_layout(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`layout` of one leaf by its name, as `leaf_name` gives it."""
    names = next((names for pattern, names in RULES if re.search(pattern, "/" + name)), ())
    if len(names) > len(shape):
        names = ()
    spec: list[Any] = [None] * (len(shape) - len(names))
    for size, split in zip(shape[len(shape) - len(names) :], names, strict=True):
        axis = MESH_AXIS.get(split)
        if split == "columns":
            spec.append(column_axes(size, mesh.shape) or None)
        else:
            spec.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def place(tree: Any, shardings: Any) -> Any:
    """Puts host or local arrays, equal in all processes, where `shardings` says; committed, so that a restored state
    recompiles nothing."""

    def leaf(x: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable or getattr(x, "sharding", None) == sharding:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(leaf, tree, shardings)


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes and types of a tree's arrays, or of shapes, where `place` would put them."""

    def leaf(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        x = x if hasattr(x, "dtype") else np.asarray(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree, shardings)


def bytes_on_device(tree: Any) -> int:
    """Bytes that one device holds of arrays, or of what `placed` returns."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Splits every leaf along its first axis over `data` and `fsdp` where that divides evenly; replicates the rest.

    With several processes, a leaf is this process's slice (see `batch_shard`), those named in `WHOLE` excepted.
    """
    split = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def leaf(path: tuple[Any, ...], x: np.ndarray, here: NamedSharding) -> jax.Array:
        if here.is_fully_addressable:
            return jax.make_array_from_process_local_data(here, x)
        if leaf_name(path) in WHOLE:
            # As one process would place it: another layout would sum in another order.
            return jax.make_array_from_callback(x.shape, here, lambda index: x[index])
        return jax.make_array_from_process_local_data(split, x)

    return jax.tree_util.tree_map_with_path(leaf, batch, batch_layout(batch, mesh))


def batch_layout(batch: Any, mesh: Mesh) -> Any:
    """Where `place_batch` puts a batch of one process."""
    split, whole = NamedSharding(mesh, PartitionSpec(BATCH_AXES)), NamedSharding(mesh, PartitionSpec())
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return jax.tree.map(lambda x: split if x.size and x.shape and x.shape[0] % devices == 0 else whole, batch)


def local(tree: Any, mesh: Mesh) -> Any:
    """The tree as this process can read it alone: as it is for one process, else whole copies on a device of it."""
    whole = NamedSharding(mesh, PartitionSpec())
    if whole.is_fully_addressable:
        return tree
    gathered = jax.jit(lambda tree: tree, out_shardings=whole)(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), gathered)


def join_processes() -> None:
    """Joins the processes of one run; to be called before anything else touches a device.

    JAX finds the others by itself under SLURM, Open MPI, Kubernetes and on TPU pods, else by its own variable
    JAX_COORDINATOR_ADDRESS (host:port of the first process) and JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    numbers: dict[str, Any] = {
        argument: int(os.environ[variable])
        for argument, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID"))
        if variable in os.environ
    }
    jax.distributed.initialize(**numbers)


def is_primary() -> bool:
    """Whether this process writes logs and tables."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(values: np.ndarray) -> np.ndarray:
    """The first process's values, in all processes."""
    return multihost_utils.broadcast_one_to_all(values) if jax.process_count() > 1 else values
