"""Parameter trees by path."""

from __future__ import annotations

from typing import Any, cast

from flax import traverse_util


def flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    """Leaves of nested dictionaries by path; `flax.traverse_util.unflatten_dict` goes back.

    What flax declares for it is all that its options can make of a tree.
    """
    return cast(dict[tuple[str, ...], Any], traverse_util.flatten_dict(tree))
