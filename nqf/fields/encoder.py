"""What a frozen field encoder is, the state that the light ones share, and the choice of one for a field."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import polars as pl

from nqf import files
from nqf.config import FieldsConfig, InputError
from nqf.data.errors import NPY_ERRORS, STRUCTURE_ERRORS
from nqf.data.schema import Field


class CacheError(InputError):
    """A cache, or an encoder in it, that cannot be used; the message names the file and what to do."""


class FieldEncoder(Protocol):
    """A frozen function from raw values to vectors.

    Vectors are scaled so that an average readable value has about unit norm (mean square 1 / width), whatever
    the modality, so that no field drowns another.

    Attributes:
      width: Length of a vector.
      identity: JSON-able and complete: two encoders of equal identity give equal vectors. It goes into the
        manifest; a cached value is reused only under the identity that made it.
    """

    width: int

    @property
    def identity(self) -> dict[str, Any]: ...

    def encode(self, values: Any) -> tuple[np.ndarray, np.ndarray]:
        """Encodes present values: float32 [n, width], and bool [n] that is False where one could not be read."""
        ...

    def save(self, directory: Path) -> None:
        """Writes `encoder.json` (the identity) and whatever else is needed to make the encoder again."""
        ...


# Values to fit on: distinct, in chunks; may be iterated more than once.
Values = Callable[[], Iterator[pl.Series]]
# Makes the pretrained encoder of a field; called again to load it.
EncoderFactory = Callable[[Field, FieldsConfig], FieldEncoder]


class LightEncoder(abc.ABC):
    """Base of the encoders that need no download: options in JSON, fitted arrays in one .npz, no pickle.

    Attributes:
      kind: Name in the identity.
      version: Raised when the same options and arrays would give other vectors.
      options: JSON-able options.
      state: Fitted arrays, by name.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    width: int

    def __init__(self, options: Mapping[str, Any], state: Mapping[str, np.ndarray]):
        self.options = dict(options)
        self.state = dict(state)

    @classmethod
    @abc.abstractmethod
    def fit(cls, values: Values, field: Field, config: FieldsConfig) -> Self:
        """Fits the encoder of a field on a sample of its distinct values."""

    @classmethod
    @abc.abstractmethod
    def settings(cls, field: Field, config: FieldsConfig) -> dict[str, Any]:
        """What of the field's options and the configuration a fit depends on; the encoder is fitted again when
        this changes, and at no other time."""

    @abc.abstractmethod
    def encode(self, values: Any) -> tuple[np.ndarray, np.ndarray]:
        """As `FieldEncoder.encode`; values are a column or a list."""

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, version, options and the SHA-256 of the fitted arrays."""
        digest = hashlib.sha256()
        for name, array in sorted(self.state.items()):
            digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return {"kind": self.kind, "version": self.version, "options": self.options, "state": digest.hexdigest()}

    def save(self, directory: Path) -> None:
        """Writes `encoder.json` and `state.npz`."""
        (directory / "encoder.json").write_text(json.dumps(self.identity, indent=1, sort_keys=True), encoding="utf-8")
        arrays: dict[str, Any] = dict(self.state)
        np.savez(directory / "state.npz", **arrays)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
          CacheError: A file is missing or damaged, or the arrays are not those that the identity names.
        """
        identity = read_identity(directory)
        try:
            encoder = cls(identity["options"], files.read_arrays(directory / "state.npz"))
        except (*NPY_ERRORS, *STRUCTURE_ERRORS) as error:
            raise CacheError(f"{directory / 'state.npz'}: not readable ({error}); build the cache again") from error
        if encoder.identity != identity:
            raise CacheError(f"{directory}: fitted state or version differs from encoder.json; build the cache again")
        return encoder


def read_identity(directory: Path) -> dict[str, Any]:
    """Reads the identity of a saved encoder.

    Raises:
      CacheError: `encoder.json` is missing or is not JSON.
    """
    try:
        return files.read_json(directory / "encoder.json")
    except ValueError as error:
        raise CacheError(f"{error}; build the cache again") from error


def rms_scale(vectors_NxW: np.ndarray) -> float:
    """The factor that brings the rows' root-mean-square norm to 1; 1 if they are all zero."""
    norm = float(np.sqrt(np.mean(np.sum(np.square(vectors_NxW, dtype=np.float64), axis=1)))) if len(vectors_NxW) else 0
    return 1.0 / norm if norm > 0 else 1.0


def unit_rows(vectors_NxW: np.ndarray) -> np.ndarray:
    """Rows of norm 1, float32; zero rows stay zero."""
    norms = np.linalg.norm(vectors_NxW, axis=1, keepdims=True)
    return (vectors_NxW / np.where(norms > 0, norms, 1)).astype(np.float32)
