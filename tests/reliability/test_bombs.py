"""Files of a few bytes that ask for more memory or time than there is: refused with a message, in bounded memory."""

import copy
import gzip
import io
import json
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from parquet_files import (
    BYTE_ARRAY,
    DICTIONARY,
    I64,
    PLAIN,
    RLE,
    UTF8,
    closed,
    column,
    constant,
    file_of,
    page,
    strings,
    varint,
)

from nqf.data.errors import NPY_ERRORS
from nqf.files import read_arrays

ROOT = Path(__file__).parents[2]
TWO = strings([b"a", b"b"])
DATA = {1: 2, 2: PLAIN, 3: RLE, 4: RLE}


def one(rows: int, header: dict, content: bytes, uncompressed: int | None = None, codec: int = 0) -> bytes:
    """A file of a column with one page."""
    return file_of([column("item_id", rows, [page(0, header, content, uncompressed)], codec=codec)], rows)


def schema(elements: list[dict]) -> bytes:
    """A file without rows."""
    return closed(b"PAR1", {1: 1, 2: [{4: b"schema", 5: 1}, *elements], 3: I64(0), 4: []})


def nested(depth: int, repetition: int) -> bytes:
    inner = [{3: repetition, 4: b"item_id", 5: 1}] * depth
    return schema([*inner, {1: BYTE_ARRAY, 3: 0, 4: b"leaf", 6: UTF8}])


def dictionary_of(entries: int) -> bytes:
    run = bytes([1]) + varint(4) + b"\0"
    pages = [page(2, {1: entries, 2: PLAIN}, TWO), page(0, DATA | {2: DICTIONARY}, run)]
    return file_of([column("item_id", 2, pages)], 2)


def gzip_page() -> bytes:
    content = strings([b"x" * 2**20])
    size = 500 * len(content)
    return one(500, DATA | {1: 500}, gzip.compress(content) * 500, size, codec=2)


BOMBS: dict[str, Callable[[], bytes]] = {
    "10^9 rows of one text": lambda: file_of([constant("item_id", b"x", 10**9)], 10**9),
    "10^9 rows in the page alone": lambda: one(2, DATA | {1: 10**9}, TWO),
    "10^9 rows in the footer alone": lambda: one(10**9, DATA, TWO),
    "10^15 rows": lambda: one(10**15, DATA, TWO),
    "a dictionary of 10^9 texts": lambda: dictionary_of(10**9),
    "a page of 2 GiB in the header alone": lambda: one(2, DATA, gzip.compress(TWO), 2**31 - 1, codec=2),
    "a page of negative size": lambda: one(2, DATA, TWO, -5),
    "a page that unpacks to 500 MiB": gzip_page,
    "structures 10^5 deep": lambda: nested(10**5, 0),
    "lists 10^4 deep": lambda: nested(10**4, 2),
    "10^5 columns": lambda: schema([{1: BYTE_ARRAY, 3: 0, 4: b"c%d" % n, 6: UTF8} for n in range(10**5)]),
    "a schema of 2^31 elements": lambda: closed(b"PAR1", bytes([0x15, 2, 0x19, 0xFC]) + varint(2**31 - 1)),
    "an unknown structure 10^5 deep": lambda: closed(b"PAR1", b"\x15\x02" + b"\xbc" * 10**5),
    "a number without end": lambda: closed(b"PAR1", b"\x15" + b"\xff" * 10**5),
    "a footer before the file": lambda: b"PAR1" + (2**32 - 1).to_bytes(4, "little") + b"PAR1",
}
# In a process of its own, which polars would end.
READ = """
import json, sys
from pathlib import Path
from nqf.data.errors import DataError
from nqf.data.readers import read_table

folder, found = Path(sys.argv[1]), {}
for path in sorted(folder.glob("*.parquet")):
    try:
        read_table(path, folder, {"item_id": None}).collect()
    except DataError as error:
        found[path.name] = str(error)
# Of this program alone: ru_maxrss counts what the process held that became it, too.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps([found, int(peak.split()[1])]))
"""


def limited(script: str, *arguments: str, gibibytes: int = 8) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process that can have so much address space and no more."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (gibibytes << 30, gibibytes << 30)),
    )


def test_parquet_files_that_ask_for_all_memory(tmp_path: Path, record: Callable[..., None]) -> None:
    good = one(2, DATA, TWO)
    for number, bomb in enumerate(BOMBS.values()):
        (tmp_path / f"{number:02d}.parquet").write_bytes(bomb())
    (tmp_path / "good.parquet").write_bytes(good)
    done = limited(READ, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2_000:]
    found, peak = json.loads(done.stdout)
    # The same file without a lie is read.
    assert list(found) == [f"{number:02d}.parquet" for number in range(len(BOMBS))], done.stdout
    for name, message in found.items():
        assert message.startswith(str(tmp_path / name)) and len(message) < 2_000, message
    assert peak < 1024 * 1024, f"{peak} KiB"
    record(
        "a Parquet file of a few bytes that asks for all memory: runs, pages, dictionaries and footers that lie about "
        "their size, nesting 10^5 deep",
        tried=len(BOMBS),
        survived=len(found),
        seen=f"{len(found)} refused with file and reason before polars opens it, which would end the process",
    )


def npy(shape: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + content


def npz(members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def overlapping() -> bytes:
    """A thousand names of one member."""
    buffer = io.BytesIO(npz({"a.npy": npy("(2,)", bytes(16))}))
    with zipfile.ZipFile(buffer, "a") as archive:
        for number in range(1_000):
            twin = copy.copy(archive.filelist[0])
            twin.filename = f"{number}.npy"
            archive.filelist.append(twin)
        archive._didModify = True
    return buffer.getvalue()


ARRAYS: dict[str, Callable[[], bytes]] = {
    "packed zeros": lambda: npz({"a.npy": npy(f"({2**22},)", bytes(2**25))}, zipfile.ZIP_DEFLATED),
    "a thousand names of one member": overlapping,
    "10^15 numbers": lambda: npz({"a.npy": npy(f"({10**15},)")}),
    "more numbers than there are": lambda: npz({"a.npy": npy("(9,)", bytes(16))}),
    "a negative length": lambda: npz({"a.npy": npy("(-9,)", bytes(16))}),
    "a length of 10^30": lambda: npz({"a.npy": npy(f"({10**30},)")}),
    "an expression": lambda: npz({"a.npy": npy("(__import__('os').getpid(),)")}),
    "a header 10^5 brackets deep": lambda: npz({"a.npy": npy("(" * 10**5)}),
    "a header of 2^32 bytes": lambda: npz({"a.npy": b"\x93NUMPY\x02\x00" + b"\xff" * 4}),
    "no archive": lambda: b"PK" * 99,
}


def test_arrays_that_ask_for_all_memory(tmp_path: Path, record: Callable[..., None]) -> None:
    path = tmp_path / "arrays.npz"
    np.savez(path, a=np.arange(3))
    assert read_arrays(path)["a"].tolist() == [0, 1, 2]
    for name, bomb in ARRAYS.items():
        path.write_bytes(bomb())
        try:
            read_arrays(path)
        except NPY_ERRORS as error:
            assert len(str(error)) < 10**6
        else:
            raise AssertionError(name)
    record(
        "an .npz file that asks for all memory: packed, overlapping, with headers that lie, nest or hold code",
        tried=len(ARRAYS),
        survived=len(ARRAYS),
        seen="refused with the file by whatever opens it",
    )
