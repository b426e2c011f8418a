"""Folders of Hugging Face models, and named tensors to a Flax parameter tree, every mismatch reported at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from nqf.files import read_json, sha256
from nqf.interop.torch_file import CheckpointError, Tensor, TorchFile
from nqf.models.trees import flatten

# A tensor's name in the PyTorch model to its path in the parameter tree.
Table = Mapping[str, tuple[str, ...]]
_LISTED = 40
# What a model folder is read for, and what only if there are no such weights (`nqf.interop.torch_file` reads them).
_PATTERNS, _PICKLES = ["*.json", "*.safetensors", "*.txt", "*/pytorch_model.bin"], ["*.bin"]
# Bytes of a tensor that are read at a time: few enough to be transposed within a core's cache.
_BLOCK = 1 << 17
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
GOLDEN, GOLDEN_TEXTS = "golden.safetensors", "golden_texts.safetensors"


def resolve_folder(name: str | Path) -> Path:
    """A local folder as it is, or the local copy of a Hugging Face hub repository.

    Raises:
      ValueError: Neither a folder nor a repository that is available; says how to work offline.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    options: dict[str, Any] = {"ignore_patterns": ["onnx/*", "openvino/*"]}
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=_PATTERNS, **options))
        if not any(folder.rglob("*.safetensors")):
            snapshot_download(str(name), allow_patterns=_PATTERNS + _PICKLES, **options)
        return folder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name}: no such folder, and unavailable on the hub ({error}); without a network give a folder with "
            "config.json and model.safetensors"
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A tensor's place in a file of weights.

    The file is read, not mapped: mapped pages would stay in memory beside the arrays made of them.

    Attributes:
      path: The file.
      dtype: Type of the elements.
      shape: Shape.
      start: First byte.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def blocks(self, rows: slice = slice(None)) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields what `rows` of the first axis hold, a bounded number of bytes at a time, each with its place in it."""
        start, stop, _ = rows.indices(self.shape[0])
        row = math.prod(self.shape[1:])
        size = max(_BLOCK // (row * self.dtype.itemsize), 1)
        with self.path.open("rb") as file:
            file.seek(self.start + start * row * self.dtype.itemsize)
            for first in range(0, stop - start, size):
                count = min(size, stop - start - first)
                block = np.fromfile(file, self.dtype, count * row)
                yield slice(first, first + count), block.reshape(count, *self.shape[1:])

    def read(self) -> np.ndarray:
        """The whole tensor."""
        return np.fromfile(self.path, self.dtype, math.prod(self.shape), offset=self.start).reshape(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read a folder's weights from, in its order of preference.

    Raises:
      ValueError: There are none, or an index names none.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()) or not names:
                raise ValueError(f"{index}: no 'weight_map' from tensors to files")
            inside = {name for name in names.values() if Path(name).name == name}
            if len(inside) < len(set(names.values())):
                raise ValueError(f"{index}: names files outside of the folder")
            return [folder / name for name in sorted(inside)]
    raise ValueError(
        f"{folder}: no model.safetensors and no pytorch_model.bin, nor an index of either; weights in other formats "
        "are not read"
    )


def list_tensors(paths: Sequence[Path], *, skip: str = r"(?!)") -> dict[str, TensorFile]:
    """Places of all tensors in `.safetensors` files (format: huggingface.co/docs/safetensors) or files of `torch.save`.

    Args:
      paths: The files.
      skip: Regular expression of names that are left out, whatever their type.

    Raises:
      ValueError: A file that is missing, damaged or cut short, or a tensor of a type that weights do not have.
    """
    tensors = {}
    for path in paths:
        tensors |= _torch_tensors(path, skip) if path.suffix == ".bin" else _safetensors(path, skip)
    return tensors


def _safetensors(path: Path, skip: str) -> dict[str, TensorFile]:
    tensors = {}
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("the header is cut short")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__" or re.fullmatch(skip, name):
                continue
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} is of type {entry['dtype']}; read are {', '.join(_DTYPES)}")
            dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
                raise ValueError(f"{name} has shape {shape} at {start} to {stop}")
            if stop - start != math.prod(shape) * dtype.itemsize or 8 + length + stop > size:
                raise ValueError(f"{name} is cut short")
            tensors[name] = TensorFile(path=path, dtype=dtype, shape=shape, start=8 + length + start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as safetensors ({error})") from error
    return tensors


def _torch_tensors(path: Path, skip: str) -> dict[str, TensorFile]:
    tensors = {}
    with TorchFile(path) as file:
        for name, tensor in (file.tree if isinstance(file.tree, dict) else {"": None}).items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(f"{path}: {name!r} is no tensor; read are dictionaries of tensors (`state_dict`)")
            if re.fullmatch(skip, name):
                continue
            dtype = tensor.storage.dtype
            if dtype not in _DTYPES.values():
                raise CheckpointError(f"{path}: {name} is of type {dtype}; read are {', '.join(_DTYPES)}")
            tensors[name] = TensorFile(path=path, dtype=dtype, shape=tensor.shape, start=file.place(tensor, name))
    return tensors


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's weights, configuration and vocabulary."""
    digest = hashlib.sha256()
    patterns = ("*.json", "*.safetensors", "*.txt", "*.bin")
    for path in sorted(path for pattern in patterns for path in folder.rglob(pattern)):
        digest.update(f"{path.relative_to(folder).as_posix()}|{path.stat().st_size}|".encode())
        digest.update(bytes.fromhex(sha256(path)))
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
    expected = flatten(abstract)
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
    flat = flatten(params)
    return {name: np.ascontiguousarray(to_torch(np.asarray(flat[path]), path)) for name, path in table.items()}
