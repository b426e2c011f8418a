"""Where arrays lie on devices. Each function on activations is the identity outside of a mesh, and on one device.

Without pins XLA's partitioner may move whole batches of activations where it could move the weights of a layer. A batch
is split by its examples, a table by its columns: those divide evenly whatever the size of the catalogue, and a lookup
and its gradient move the rows of the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, get_abstract_mesh

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def pin(x: Any, *axes: tuple[str, ...] | None) -> Any:
    """Splits the leading axes of an array over axes of the mesh that a step is traced for; the rest stays whole.

    Sizes need not divide evenly: the compiler fills up.
    """
    mesh = get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def over_batch(x: Any, columns: tuple[str, ...] = ()) -> Any:
    """Splits the examples, x's first axis, as batches are split; what does not divide evenly stays as it is.

    Args:
      x: An array of two axes or more.
      columns: Axes of the mesh over which the last one is split.
    """
    if not _divides(x):
        return x
    return pin(x, BATCH_AXES, *(None,) * (x.ndim - 2), columns or None)


def _divides(x: Any) -> bool:
    """Whether the examples, x's first axis, divide evenly over the mesh."""
    sizes = get_abstract_mesh().shape
    return x.shape[0] % math.prod(sizes.get(axis, 1) for axis in BATCH_AXES) == 0


def over_all(x: Any) -> Any:
    """Splits the first axis over all devices."""
    return pin(x, AXES)


def column_axes(columns: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of a mesh of some sizes over which a table's columns are split: all that divide evenly."""
    suffixes = (AXES[start:] for start in range(len(AXES)))
    return next((axes for axes in suffixes if columns % math.prod(sizes[axis] for axis in axes) == 0), ())


def take_rows(table: Any, rows: Any, *, fill: bool = False) -> Any:
    """`table[rows]` of a table [n, ..., columns], split by examples for rows [B, ...] and by columns for rows [R].

    Rows outside of the table become NaN with `fill`.
    """
    sizes = get_abstract_mesh().shape
    axes = column_axes(table.shape[-1], sizes) if sizes and table.ndim > 1 else ()

    def take(rows: Any) -> Any:
        return jnp.take(table, rows, axis=0) if fill else table[rows]

    if not axes:
        return take(rows)
    middle = (None,) * (table.ndim - 2)
    table = pin(table, None, *middle, axes)
    taken = pin(take(pin(rows)), *(None,) * rows.ndim, *middle, axes)
    return taken if rows.ndim == 1 else columns_to_batch(taken)


def columns_to_batch(x: Any) -> Any:
    """Examples [B, ..., columns] that are split by columns, split by examples: an exchange over the axes of the batch,
    then one over the others, which the compiler does not find by itself."""
    sizes = get_abstract_mesh().shape
    axes = column_axes(x.shape[-1], sizes) if sizes else ()
    return over_batch(over_batch(x, tuple(axis for axis in axes if axis not in BATCH_AXES)))


def on_examples_and_heads(
    attend: Callable[[Any, Any, Any], Any], q_BxTxHxK: Any, k_BxSxGxK: Any, v_BxSxGxK: Any
) -> Any:
    """Calls a kernel, which the compiler can't split, on each device with its examples and, if they divide, its heads.

    Args:
      attend: Of queries, keys and values to what is read, float [B, T, H, K].
      q_BxTxHxK: Queries.
      k_BxSxGxK: Keys.
      v_BxSxGxK: Values.
    """
    mesh = get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK)
    by_head = "tensor" if k_BxSxGxK.shape[2] % mesh.shape["tensor"] == 0 else None
    split = PartitionSpec(BATCH_AXES if _divides(q_BxTxHxK) else None, None, by_head)
    whole = jax.shard_map(attend, in_specs=(split, split, split), out_specs=split, check_vma=False)
    return whole(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK)


def on_local_devices(values: Any, *, split: bool = False) -> Any:
    """Puts arrays on the devices of this process: whole on each, or the rows, which divide evenly, split over them."""
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("rows",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec("rows") if split else PartitionSpec()))
