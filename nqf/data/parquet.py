"""What a Parquet file asks for, found out before polars opens it.

Polars allocates what headers say and follows their nesting, and ends the process where that fails: a file of a hundred
bytes can ask for any amount of memory. Footer and page headers are structures in the compact protocol of Thrift
(https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift), whose fields have numbers.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from nqf.data.errors import STRUCTURE_ERRORS, DataError
from nqf.data.text import MOST_COLUMNS

_DEEPEST = 100
# As of .gz: tables shrink by less. A value, even one that takes no room in the file, takes 16 bytes in polars.
_LARGEST_RATIO, _LEAST_ROOM, _VALUE = 200, 256 * 2**20, 16


def checked(path: Path) -> Path:
    """The path of a Parquet file that asks for no more than what a table of its size may hold.

    Raises:
      DataError: It asks for more, is deeply nested, or its headers cannot be read.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            asked = _asked(data)
    except DataError:
        raise
    except (*STRUCTURE_ERRORS, ValueError, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {str(error)[:300]}") from error
    if asked > _LEAST_ROOM + _LARGEST_RATIO * size:
        raise DataError(
            f"{path}: {size:,} bytes that ask for {asked:,} in memory, more than {_LARGEST_RATIO} times as much, as "
            "files do that are made to fill it; if it is meant, write the columns that are needed as CSV"
        )
    return path


def _asked(data: mmap.mmap) -> int:
    """Bytes that the pages of a file unpack to."""
    end = len(data) - 8
    start = end - int.from_bytes(data[end : end + 4], "little")
    if data[-4:] != b"PAR1" or start < 4:
        raise ValueError("no footer")
    footer = _Thrift(data, start, end).structure()
    _check_schema([element.get(5, 0) for element in footer[2]])
    asked = 0
    for group in footer[4]:
        for chunk in group[1]:
            said = chunk[3]
            # The pages of a column lie one after the other, that of its dictionary first.
            at = said.get(11) or said[9]
            stop = at + said[7]
            if not 0 <= at <= stop <= end:
                raise ValueError("a column outside of the file")
            asked += _VALUE * max(said[5], group[3])
            while at < stop:
                reader = _Thrift(data, at, stop)
                page = reader.structure()
                inner = page.get(5) or page.get(7) or page.get(8) or {}
                asked += page[2] + _VALUE * inner.get(1, 0)
                if min(page[2], page[3], inner.get(1, 0)) < 0:
                    raise ValueError("a page of negative size")
                at = reader.at + page[3]
            if at != stop:
                raise ValueError("pages that overlap")
    return asked


def _check_schema(children: list[int]) -> None:
    """Checks the numbers of children of a schema's elements, which stand as a depth-first walk meets them."""
    if len(children) > MOST_COLUMNS:
        raise ValueError(f"more than {MOST_COLUMNS:,} columns")
    left: list[int] = []
    for count in children:
        if left:
            left[-1] -= 1
        if count > 0:
            left.append(count)
        while left and left[-1] == 0:
            left.pop()
        if len(left) > _DEEPEST:
            raise ValueError(f"nested deeper than {_DEEPEST} levels")


class _Thrift:
    """Reads one structure; numbers of fields stand for their names."""

    def __init__(self, data: mmap.mmap, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def structure(self, depth: int = 0) -> dict[int, Any]:
        """Fields by their number; binary values as their length."""
        if depth > _DEEPEST:
            raise ValueError(f"nested deeper than {_DEEPEST} levels")
        fields, last = {}, 0
        while head := self._byte():
            last = last + (head >> 4) if head >> 4 else self._whole()
            kind = head & 15
            fields[last] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._whole()
        if kind == 12:
            return self.structure(depth + 1)
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            # Each takes a byte at least.
            if count > self.end - self.at or depth > _DEEPEST:
                raise ValueError("a list longer than the file")
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        length = 8 if kind == 7 else self._varint() if kind == 8 else -1
        if not 0 <= length <= self.end - self.at:
            raise ValueError("a value longer than the file, or of an unknown kind")
        self.at += length
        return length

    def _byte(self) -> int:
        if self.at >= self.end:
            raise ValueError("cut off")
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value, shift = 0, 0
        while (byte := self._byte()) & 0x80:
            value, shift = value | (byte & 0x7F) << shift, shift + 7
            if shift > 63:
                raise ValueError("a number longer than 64 bits")
        return value | byte << shift

    def _whole(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
