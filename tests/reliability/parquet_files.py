"""Parquet files written by hand, so that they can say anything: https://github.com/apache/parquet-format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Kinds of the compact protocol of Thrift.
_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
Column = tuple[dict, bytes, Callable[[int], dict]]
UTF8, BYTE_ARRAY, PLAIN, RLE, DICTIONARY = 0, 6, 0, 3, 8


class I64(int):
    """A whole number that the format has as 64 bits."""


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _kind(value: Any) -> int:
    if isinstance(value, int):
        return _I64 if isinstance(value, I64) else _I32
    return {bytes: _BINARY, list: _LIST, dict: _STRUCT}[type(value)]


def thrift(value: Any) -> bytes:
    """A structure, given as its numbered fields, in the compact protocol."""
    if isinstance(value, int):
        return varint(value << 1 if value >= 0 else (-value << 1) - 1)
    if isinstance(value, bytes):
        return varint(len(value)) + value
    if isinstance(value, list):
        kind = _kind(value[0]) if value else _I32
        head = bytes([len(value) << 4 | kind]) if len(value) < 15 else bytes([0xF0 | kind]) + varint(len(value))
        return head + b"".join(map(thrift, value))
    out, last = b"", 0
    for number, field in value.items():
        out += bytes([number - last << 4 | _kind(field)]) + thrift(field)
        last = number
    return out + b"\0"


def strings(texts: Sequence[bytes]) -> bytes:
    """Texts in the plain encoding."""
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def page(kind: int, header: dict, content: bytes, uncompressed: int | None = None) -> bytes:
    """A page with its header."""
    size = len(content) if uncompressed is None else uncompressed
    return thrift({1: kind, 2: size, 3: len(content), (5 if kind == 0 else 7): header}) + content


def column(name: str, rows: int, pages: Sequence[bytes], *, codec: int = 0) -> Column:
    """A required column of texts: its part of the schema, its pages, and what the footer says of them at a place.

    Of several pages, the first is the dictionary.
    """
    content = b"".join(pages)

    def said(at: int) -> dict:
        places = {9: I64(at + len(pages[0])), 11: I64(at)} if len(pages) > 1 else {9: I64(at)}
        sizes = {5: I64(rows), 6: I64(len(content)), 7: I64(len(content))}
        return {1: BYTE_ARRAY, 2: [PLAIN, RLE, DICTIONARY], 3: [name.encode()], 4: codec} | sizes | places

    return {1: BYTE_ARRAY, 3: 0, 4: name.encode(), 6: UTF8}, content, said


def file_of(columns: Sequence[Column], rows: int) -> bytes:
    """A file of one row group."""
    out, chunks = b"PAR1", []
    for _, content, said in columns:
        chunks.append({2: I64(len(out)), 3: said(len(out))})
        out += content
    root = {4: b"schema", 5: len(columns)}
    group = {1: chunks, 2: I64(len(out)), 3: I64(rows)}
    return closed(out, {1: 1, 2: [root, *(element for element, _, _ in columns)], 3: I64(rows), 4: [group]})


def closed(out: bytes, footer: dict | bytes) -> bytes:
    """A file with its footer."""
    footer = footer if isinstance(footer, bytes) else thrift(footer)
    return out + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def constant(name: str, text: bytes, rows: int) -> Column:
    """A column that says one text in all rows, in a few bytes: an entry of the dictionary and a run of it."""
    dictionary = page(2, {1: 1, 2: PLAIN}, strings([text]))
    # Width of the indices in bits, and one run of the same index.
    run = bytes([1]) + varint(rows << 1) + b"\0"
    return column(name, rows, [dictionary, page(0, {1: rows, 2: DICTIONARY, 3: RLE, 4: RLE}, run)])
