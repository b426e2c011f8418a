"""Work on many cases or items, cut into parts of a fixed number of them, which processes share through a folder.

A part is the same to the byte whoever makes it, so a process that is ended costs the part that it was at.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nqf import files
from nqf.data.errors import NPY_ERRORS

CASES = 32_768
"""Cases or items of a part. A process by itself cuts them in the same way. In smaller parts the batches that are not
full, one for each length of histories, would cost more than a few percent."""


Make = Callable[[slice], Mapping[str, np.ndarray]]
"""Makes the arrays of some cases, [cases, ...]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """How work is shared.

    Attributes:
      folder: Folder of the parts, which processes that do the very same work are given; None for a process by itself,
        which writes nothing.
    """

    folder: Path | None = None

    @property
    def size(self) -> int:
        """Cases of a part."""
        return CASES

    def rows(self, name: str, count: int, make: Make) -> dict[str, np.ndarray]:
        """Makes arrays with a row per case, together with the other processes; returns when all parts are there.

        Parts that another process is at are waited for, and made here should it end.

        Args:
          name: Head of the names of the parts, once for each kind of work.
          count: Number of cases; with none, `make` is asked once.
          make: Makes the arrays of some cases, [cases, ...].

        Returns:
          The arrays of all cases.

        Raises:
          ValueError: A file with the name of a part is none; it is kept.
        """
        self.fill(name, count, make)
        parts = [arrays for _, arrays in self.each(name, count, make)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def each(self, name: str, count: int, make: Make) -> Iterator[tuple[slice, Mapping[str, np.ndarray]]]:
        """The arrays of `rows`, one part after the other: of the folder, after `fill`, or made now without one."""
        spans = self._spans(count)
        if self.folder is None:
            yield from ((span, make(span)) for span in spans)
            return
        yield from ((span, _read(path, span)) for span, path in zip(spans, self._paths(name, count), strict=True))

    def fill(self, name: str, count: int, make: Make) -> None:
        """Makes the parts of `rows` that are not there, together with the other processes; none without a folder."""
        if self.folder is None:
            return
        spans, paths = self._spans(count), self._paths(name, count)

        def write(number: int) -> None:
            arrays: dict[str, Any] = dict(make(spans[number]))
            with files.whole(paths[number]) as file:
                np.savez(file, **arrays)

        _make_together(paths, write)

    def _spans(self, count: int) -> list[slice]:
        return [slice(start, min(start + self.size, count)) for start in range(0, max(count, 1), self.size)]

    def _paths(self, name: str, count: int) -> list[Path]:
        assert self.folder is not None
        return [self.folder / f"{name}-{number:05d}.npz" for number in range(len(self._spans(count)))]

    def remove(self, name: str) -> None:
        """Deletes the parts of `rows`, which nobody needs any more, and the folder if nothing else is in it."""
        assert self.folder is not None
        for path in (*self.folder.glob(f"{name}-*.npz"), *self.folder.glob(f".{name}-*")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def once(self, name: str, make: Callable[[], None]) -> None:
        """Lets one of the processes do something, if it has not been done; returns when it has.

        Args:
          name: Name of the file that says so.
          make: Does it; may be asked again where a process ended in the middle.
        """
        if self.folder is None:
            make()
            return
        path = self.folder / name

        def write(number: int) -> None:
            make()
            files.write_text(path, "")

        _make_together([path], write)


ALONE = Shares()


def _make_together(paths: list[Path], write: Callable[[int], None]) -> None:
    """Writes those files, by their numbers, that no other process writes; returns when all are there."""
    while True:
        for number, path in enumerate(paths):
            with files.claimed(path) as mine:
                if mine and not path.exists():
                    write(number)
        if not files.abandoned(paths):
            return


def _read(path: Path, span: slice) -> dict[str, np.ndarray]:
    try:
        arrays = files.read_arrays(path)
        if not arrays or any(array.shape[:1] != (span.stop - span.start,) for array in arrays.values()):
            raise ValueError(f"not of {span.stop - span.start} cases")
    except NPY_ERRORS as error:
        raise ValueError(f"{path}: not a part of this work ({error}); move it away") from error
    return arrays
