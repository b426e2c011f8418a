"""Reads files of `torch.save` without PyTorch and without executing anything that stands in them.

Such a file is a zip archive: raw storages, and a pickle program that says how to put them together. `_interpret`
steps through that program with the standard library's disassembler (`pickletools`), which only splits it into
instructions. It has a case for each of the few instructions that dictionaries, lists, numbers, strings, tensors and
one configuration class need; names such as `torch._utils._rebuild_tensor_v2` are compared with a list and never
imported or called; every other instruction and every other name ends in an error. Python's own unpickler is not
used.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "BoolStorage": np.dtype("?"),
}
_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_CONFIG = "transformers.models.bert.configuration_bert BertConfig"
# Names that a configuration may mention (`torch_dtype`); they stay names.
_INERT = {"torch float32", "torch float16", "torch bfloat16", *(f"torch {name}" for name in _STORAGES)}
_ALLOWED = {_ORDERED_DICT, _TENSOR, _PARAMETER, _CONFIG} | _INERT
# A few hundred tensors take some ten kilobytes; what is larger than this was not written for them.
_PROGRAM_LIMIT = 64 * 2**20


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and the reason."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """A dotted name that the program mentioned; nothing is imported for it."""

    name: str


class Config(dict):
    """Attributes of the pickled BertConfig."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    length: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies; it is read when it is asked for."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """A file of `torch.save` (zip format): its object tree, and its tensors on demand."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            self._zip = zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise CheckpointError(
                f"{path}: not in torch's zip format ({error}); files of torch before 1.6 must be saved again"
            ) from None
        try:
            programs = [name for name in self._zip.namelist() if name.endswith("/data.pkl")]
            if len(programs) != 1:
                raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote")
            self._root = programs[0].removesuffix("data.pkl")
            if f"{self._root}byteorder" in self._zip.namelist() and self._bytes("byteorder", 16) != b"little":
                raise CheckpointError(f"{path}: written on a big-endian machine")
            program = self._bytes("data.pkl", _PROGRAM_LIMIT)
            try:
                self.tree = _interpret(program)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None
            except (ValueError, TypeError, LookupError, AttributeError, StopIteration) as error:
                # What a program that torch did not write runs into: an empty stack, a list as a key, ...
                raise CheckpointError(f"{path}: damaged ({error!r})") from None
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._zip.close()

    def _entry(self, name: str, limit: int) -> zipfile.ZipInfo:
        try:
            info = self._zip.getinfo(self._root + name)
        except KeyError as error:
            raise CheckpointError(f"{self.path}: damaged ({error})") from None
        # torch.save stores without compression; a compressed entry could be a bomb.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
            raise CheckpointError(f"{self.path}: entry '{name}' is compressed or larger than its tensors")
        return info

    def _bytes(self, name: str, limit: int) -> bytes:
        try:
            return self._zip.read(self._entry(name, limit))
        except (zipfile.BadZipFile, EOFError) as error:
            raise CheckpointError(f"{self.path}: damaged ({error})") from None

    def entry(self, name: str, kind: type) -> Any:
        """An entry of the dictionary at the root."""
        value = self.tree.get(name) if isinstance(self.tree, dict) else None
        if not isinstance(value, kind):
            raise CheckpointError(f"{self.path}: has no {name!r}, so it is not a checkpoint of this stage")
        return value

    def shape(self, state: dict, name: str, rank: int) -> tuple[int, ...]:
        """Shape of a tensor that the model's sizes are read from."""
        tensor = state.get(name)
        if not isinstance(tensor, Tensor) or len(tensor.shape) != rank:
            raise CheckpointError(f"{self.path}: has no tensor {name!r} of rank {rank}")
        return tensor.shape

    def place(self, tensor: Tensor, name: str) -> int:
        """First byte in the file of a tensor whose elements stand there one after another."""
        entry = self._entry(f"data/{tensor.storage.key}", tensor.storage.length * tensor.storage.dtype.itemsize)
        count = 1
        for size, stride in zip(tensor.shape[::-1], tensor.strides[::-1], strict=True):
            if size > 1 and stride != count:
                raise CheckpointError(f"{self.path}: {name} is not stored row by row; save it again with .contiguous()")
            count *= size
        if (tensor.offset + count) * tensor.storage.dtype.itemsize > entry.file_size:
            raise CheckpointError(f"{self.path}: {name} reaches beyond its storage '{tensor.storage.key}'")
        # The local header's own lengths count (APPNOTE 4.3.7): torch pads it so that storages are aligned.
        with self.path.open("rb") as file:
            file.seek(entry.header_offset + 26)
            lengths = np.fromfile(file, "<u2", 2)
        return entry.header_offset + 30 + int(lengths.sum()) + tensor.offset * tensor.storage.dtype.itemsize

    def read(self, tensor: Tensor) -> np.ndarray:
        """Reads a tensor."""
        storage = tensor.storage
        data = self._bytes(f"data/{storage.key}", storage.length * storage.dtype.itemsize)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        flat = np.frombuffer(data, storage.dtype)
        if 0 not in tensor.shape and tensor.offset + last >= len(flat):
            raise CheckpointError(f"{self.path}: a tensor reaches beyond its storage '{storage.key}'")
        strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)


_MARK = object()
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}


def _interpret(program: bytes) -> Any:
    """Runs the instructions that `torch.save` writes for dictionaries of tensors; see the module's docstring.

    Raises:
      CheckpointError: Another instruction, or a name that is not on the list.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK)
        values = stack[start + 1 :]
        del stack[start:]
        return values

    argument: Any
    for instruction, argument, _ in pickletools.genops(program):
        name = instruction.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        elif name in ("APPEND", "APPENDS"):
            values = since_mark() if name == "APPENDS" else [stack.pop()]
            _expect(stack[-1], list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = since_mark() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            _expect(stack[-1], dict).update(zip(values[::2], values[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                argument = " ".join([stack.pop() for _ in range(2)][::-1])
            if argument not in _ALLOWED:
                raise CheckpointError(
                    f"mentions '{argument.replace(' ', '.')}', which a checkpoint of tensors has no use for; refused"
                )
            stack.append(_Name(argument))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = _expect(stack.pop(), tuple), _expect(stack.pop(), _Name)
            stack.append(_construct(name, function.name, arguments))
        elif name == "BUILD":
            state = stack.pop()
            # The state of a dictionary is the version numbers that torch adds to it, which nothing reads.
            if isinstance(_expect(stack[-1], dict), Config):
                stack[-1].update(_expect(state, dict))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(f"uses the pickle instruction {name}, which a checkpoint of tensors has no use for")
    raise CheckpointError("the object tree is cut off")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise CheckpointError(f"damaged: expected {kind.__name__}, found {type(value).__name__}")
    return value


def _storage(identity: Any) -> _Storage:
    _, kind, key, _, length = _expect(identity, tuple)
    if kind.name.split()[-1] not in _STORAGES:
        raise CheckpointError(f"storage '{key}' is of the unknown type '{kind.name}'")
    return _Storage(_expect(key, str), _STORAGES[kind.name.split()[-1]], _expect(length, int))


def _construct(instruction: str, name: str, arguments: tuple) -> Any:
    if (instruction, name) == ("NEWOBJ", _CONFIG):
        return Config()
    if (instruction, name, arguments) == ("REDUCE", _ORDERED_DICT, ()):
        return {}
    if (instruction, name) == ("REDUCE", _PARAMETER):
        return _expect(arguments[0], Tensor)
    if (instruction, name) == ("REDUCE", _TENSOR):
        storage, offset, shape, strides = arguments[:4]
        numbers = [offset, *_expect(shape, tuple), *_expect(strides, tuple)]
        whole = all(isinstance(number, int) and number >= 0 for number in numbers) and len(shape) == len(strides)
        # Strides of zero could make a gigantic tensor out of a few bytes.
        if not whole or math.prod(shape) > _expect(storage, _Storage).length:
            raise CheckpointError(f"damaged: a tensor of shape {shape} with strides {strides}")
        return Tensor(storage, offset, shape, strides)
    raise CheckpointError(f"damaged: {instruction} of {name.replace(' ', '.')}")
