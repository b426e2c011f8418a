"""Devices: one mesh, batches split over it, everything else replicated."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """A mesh of all devices with the axis `data`.

    Auto axes: under jax's default, explicit ones, Linen's embeddings fail.
    """
    return jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts every leaf on all devices; committed, so that a restored state compiles nothing anew."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Splits every leaf along its first axis over `data` where that divides evenly, and replicates the rest.

    Placement never changes a result: the compiled step sees global arrays.
    """
    devices = mesh.shape["data"]
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def leaf(x: np.ndarray) -> jax.Array:
        return jax.device_put(x, split if devices > 1 and x.ndim and x.shape[0] % devices == 0 else whole)

    return jax.tree.map(leaf, batch)
