"""Folders of Hugging Face models, and named tensors to a Flax parameter tree, every mismatch reported at once."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

# A tensor's name in the PyTorch model to its path in the parameter tree.
Table = Mapping[str, tuple[str, ...]]
_LISTED = 40
# What a model folder is read for; weights in other formats (pickles among them) are never fetched.
_PATTERNS = ["*.json", "*.safetensors", "*.txt"]


def resolve_folder(name: str | Path) -> Path:
    """A local folder as it is, or the local copy of a Hugging Face hub repository.

    Raises:
      ValueError: Neither a folder nor a repository that can be had; says how to work offline.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=_PATTERNS, ignore_patterns=["onnx/*", "openvino/*"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name}: no such folder, and not to be had from the hub ({error}); without a network give a folder with "
            "config.json and .safetensors files"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: Missing or malformed; names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def open_tensors(folder: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Shapes of all tensors in a folder's `.safetensors` files, and a function that reads one by name.

    Raises:
      ValueError: No such file in the folder, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder}: no .safetensors file; weights in other formats are not read")
    shapes, where = {}, {}
    for path in paths:
        try:
            file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged ({error})") from error
        for name in file.keys():
            shapes[name], where[name] = tuple(file.get_slice(name).get_shape()), file
    return shapes, lambda name: where[name].get_tensor(name)


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's weights, configuration and vocabulary."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _PATTERNS for path in folder.rglob(pattern)):
        digest.update(f"{path.relative_to(folder).as_posix()}|{path.stat().st_size}|".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def linear(source: str, path: tuple[str, ...], *, bias: bool = True) -> dict[str, tuple[str, ...]]:
    """Table of a `torch.nn.Linear` and the `Dense` at `path`."""
    table = {f"{source}.weight": (*path, "kernel")}
    return table | {f"{source}.bias": (*path, "bias")} if bias else table


def layer_norm(source: str, path: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Table of a `torch.nn.LayerNorm` and the `LayerNorm` at `path`."""
    return {f"{source}.weight": (*path, "scale"), f"{source}.bias": (*path, "bias")}


def to_flax(array: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    """PyTorch's layout to Flax's: a `Linear` weight is [out, in] and a kernel [in, out]; a `Conv2d` weight is
    [out, in, height, width] and a kernel [height, width, in, out]."""
    if path[-1] != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)


def to_torch(array: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    """Inverse of `to_flax`."""
    if path[-1] != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def assemble(
    table: Table,
    abstract: Any,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    *,
    where: str,
    ignore: str = r"(?!)",
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Reads a model's tensors into a parameter tree, one at a time.

    Args:
      table: Name to path, for every parameter.
      abstract: The module's parameters as `jax.ShapeDtypeStruct`s.
      shapes: Shape of every tensor in the file.
      read: Reads a tensor by name.
      where: The file or folder, for messages.
      ignore: Regular expression of names that are known and not needed.
      dtype: Type of the parameters.

    Raises:
      ValueError: Missing, surplus or wrongly shaped tensors; all of them are named.
    """
    expected = traverse_util.flatten_dict(abstract)
    if set(expected) != set(table.values()):
        difference = sorted("/".join(path) for path in set(expected) ^ set(table.values()))
        raise ValueError(f"{where}: no rule, or one too many, for the parameters {', '.join(difference)}")
    errors = [f"missing {name}" for name in table if name not in shapes]
    errors += [f"surplus {name}" for name in shapes if name not in table and not re.fullmatch(ignore, name)]
    for name, path in table.items():
        # A shape without memory behind it, in the other layout.
        want = to_torch(np.broadcast_to(np.float32(0), expected[path].shape), path).shape
        if name in shapes and tuple(shapes[name]) != want:
            errors.append(f"{name} has shape {tuple(shapes[name])}, expected {want}")
    if errors:
        shown = errors[:_LISTED] + ([f"... and {len(errors) - _LISTED} more"] if len(errors) > _LISTED else [])
        raise ValueError(f"{where}: the tensors do not fit the configuration:\n  " + "\n  ".join(shown))
    return traverse_util.unflatten_dict(
        {path: jax.numpy.asarray(to_flax(read(name), path), dtype) for name, path in table.items()}
    )


def disassemble(table: Table, params: Any) -> dict[str, np.ndarray]:
    """The tensors of a parameter tree under their PyTorch names and in PyTorch's layout."""
    flat = traverse_util.flatten_dict(params)
    return {name: np.ascontiguousarray(to_torch(np.asarray(flat[path]), path)) for name, path in table.items()}
