"""Tables at addresses: what is read is what local files would give, or one paragraph that names the address."""

import contextlib
import functools
import gzip
import http.server
import importlib
import io
import json
import os
import random
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest
import unirec_files
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nqf import train
from nqf.config import ColumnsConfig, Config, DataConfig, load_config, to_tree
from nqf.data import addresses
from nqf.data.errors import DataError
from nqf.data.load import prepare
from nqf.files import is_address, masked
from nqf.stages.artifacts import parts_of, status
from nqf.stages.fields import FIELDS
from nqf.stages.graph import require
from nqf.stages.records import StageError
from nqf.stages.run import open_run
from nqf.tools import data as data_command
from nqf.tools.fit import _data, _on_disk

TINY = Path(__file__).parents[1] / "tiny.yaml"
SCHEMA = {"title": "name", "fields": {"name": "text", "price": "number", "kind": "category"}}
TABLES = ("items", "interactions")
SECRET = "hush5678"


def frames(rows: int = 30, users: int = 12) -> dict[str, pl.DataFrame]:
    rng = random.Random(0)
    items = [(f"{row:03d}", f"Thing {row} — größer", rng.random(), rng.choice("abc")) for row in range(rows)]
    events = [
        (f"u{user}", f"{rng.randrange(rows):03d}", 1_600_000_000 + 1_000 * user + at, float(rng.randrange(1, 6)))
        for user in range(users)
        for at in range(8)
    ]
    return {
        "items": pl.DataFrame(items, schema=["item_id", "name", "price", "kind"], orient="row"),
        "interactions": pl.DataFrame(events, schema=["user_id", "item_id", "timestamp", "rating"], orient="row"),
    }


def written(kind: str) -> dict[str, bytes]:
    """The files of both tables by their names."""
    found = {}
    for name, frame in frames().items():
        if kind == "parts":
            for number, part in enumerate(frame.iter_slices(len(frame) // 3)):
                found[f"{name}/part-{number:05d}.parquet"] = _bytes(part.write_parquet)
            # What Spark, Hadoop and polars leave beside the parts.
            for note in ("_SUCCESS", "_metadata", ".part-00000.parquet.crc", "part-00000.parquet.crc", ".hidden"):
                found[f"{name}/{note}"] = b"no part"
        elif kind == ".parquet":
            found[name + kind] = _bytes(frame.write_parquet)
        elif kind == ".jsonl":
            found[name + kind] = _bytes(frame.write_ndjson)
        else:
            text = frame.write_csv().encode()
            found[name + kind] = gzip.compress(text, mtime=0) if kind.endswith(".gz") else text
    return found


def _bytes(write: Callable[[Any], Any]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def config_of(where: str, kind: str, folder: Path, **options: Any) -> DataConfig:
    ending = "" if kind == "parts" else kind
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    paths = {name: f"{where}/{name}{ending}" for name in TABLES}
    return DataConfig(format="table", **paths, schema=str(folder / "schema.yaml"), **options)


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """fsspec's own file system in this process."""
    addresses.forget()
    yield fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    addresses.forget()


def upload(memory: MemoryFileSystem, files: dict[str, bytes], folder: str = "/shop") -> None:
    for name, content in files.items():
        memory.pipe_file(f"{folder}/{name}", content)


class Bucket(AbstractFileSystem):
    """A file system that does what `Bucket.does` says, and whose users have passwords.

    Attributes:
      files: Contents by path, without what stands before an @.
      version: Of all files; None tells none.
    """

    protocol = "bucket"
    files: dict[str, bytes] = {}  # noqa: RUF012
    does = ""
    version: int | None = 1
    asked = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("bucket://").rpartition("@")[2].rstrip("/")

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        Bucket.asked += 1
        if self.does == "refuses":
            raise PermissionError(f"{path}: {SECRET} may not")
        if self.does == "fails":
            raise RuntimeError(f"no answer to bucket://me:{SECRET}@{path} for {SECRET}")
        path, told = self._strip_protocol(path), {} if self.version is None else {"ETag": f'"{self.version}"'}
        inside = [name for name in self.files if name == path or name.startswith(f"{path}/")]
        found = [{"name": name, "size": len(self.files[name]), "type": "file", **told} for name in inside]
        if not found:
            raise FileNotFoundError(path)
        return found if detail else inside

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        content = self.files[self._strip_protocol(path)]
        if self.does == "changes":
            Bucket.version = (self.version or 0) + 1
        return (
            Cut(content) if self.does == "breaks" else io.BytesIO(content[: -5 if self.does == "ends early" else None])
        )


class Cut(io.BytesIO):
    """Half of a file, and then an error."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise ConnectionResetError("the line was cut")
        return super().read(len(self.getbuffer()) // 2)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Bucket]]:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    for name, value in {"files": {}, "does": "", "version": 1, "asked": 0}.items():
        monkeypatch.setattr(Bucket, name, value)
    addresses.forget()
    yield Bucket
    addresses.forget()


def fill(bucket: type[Bucket]) -> None:
    bucket.files = {f"shop/{name}": content for name, content in written(".csv").items()}


@pytest.mark.parametrize("kind", [".csv", ".csv.gz", ".jsonl", ".parquet", "parts"])
def test_the_same_as_local_files(kind: str, memory: MemoryFileSystem, tmp_path: Path) -> None:
    files = written(kind)
    put(tmp_path / "shop", files)
    upload(memory, files)
    here = prepare(config_of(str(tmp_path / "shop"), kind, tmp_path), tmp_path / "here")
    there = prepare(config_of("memory://shop", kind, tmp_path), tmp_path / "there")
    for name in ("items.parquet", "interactions.parquet", "schema.yaml"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    # Where the warnings name a file, they name the address.
    text = json.dumps(here.report).replace(str(tmp_path / "shop"), "memory://shop")
    assert json.dumps(there.report) == text
    assert list(there.split.warnings) == there.report["warnings"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "schema.yaml", "shop", "there"]


def test_messages_name_the_address(memory: MemoryFileSystem, tmp_path: Path) -> None:
    files = written(".csv")
    files["interactions.csv"] = files["interactions.csv"].replace(b"user_id", b"customer_number")
    upload(memory, files)
    dataset = prepare(config_of("memory://shop", ".csv", tmp_path), tmp_path / "data")
    noted = [line for line in dataset.split.warnings if "customer_number" in line]
    assert len(noted) == 1 and noted[0].startswith("memory://shop/interactions.csv: the user is taken from")
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "data").glob("*.json"))
    upload(memory, {"items.csv": files["items.csv"] + b"one,field,too,many,here\n"})
    with pytest.raises(DataError, match=r"^memory://shop/items\.csv: line 32: 5 fields"):
        prepare(config_of("memory://shop", ".csv", tmp_path), tmp_path / "data")


def test_folders_are_refused_as_local_ones(memory: MemoryFileSystem, tmp_path: Path) -> None:
    config = config_of("memory://shop", "parts", tmp_path)

    def refused(pattern: str) -> None:
        with pytest.raises(DataError, match=pattern):
            prepare(config, tmp_path / "data")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["schema.yaml"]

    upload(memory, written("parts"))
    upload(memory, {"items/part-00009.csv": b"item_id,name,price,kind\n900,x,1,a\n"})
    refused(r"memory://shop/items(/part-00009\.csv)?: .*")
    memory.rm("/shop/items/part-00009.csv")
    upload(memory, {"items/year=2024/part-00000.parquet": b"x"})
    refused(r"^memory://shop/items: has folders in it, such as year=2024")
    memory.rm("/shop/items", recursive=True)
    memory.makedirs("/shop/items")
    refused(r"^memory://shop/items: the folder has no files in it")
    upload(memory, {"items/_SUCCESS": b""})
    refused(r"^memory://shop/items: the folder has no files in it")


@pytest.mark.parametrize("name", ["it*m?.csv", "[ab].csv", "a b#c.csv", "50%25.csv", "ü@x.csv"])
def test_a_name_is_no_pattern(name: str, memory: MemoryFileSystem, tmp_path: Path) -> None:
    files = written(".csv")
    upload(memory, {name: files["items.csv"], "interactions.csv": files["interactions.csv"]})
    # What the pattern would find.
    upload(memory, {"items.csv": b"item_id\nno\n", "itemx.csv": b"item_id\nno\n"})
    config = config_of("memory://shop", ".csv", tmp_path)
    config = DataConfig(**{**vars(config), "items": f"memory://shop/{name}"})
    assert len(prepare(config, tmp_path / "data").catalogue) == 30


def test_a_name_is_no_chain(bucket: type[Bucket], tmp_path: Path) -> None:
    bucket.files = {"shop/a::b.csv": b"item_id\n7\n", "shop/a": b"no", "b.csv": b"no"}
    with addresses.local({"x": "bucket://shop/a::b.csv"}, tmp_path) as (paths, _):
        assert Path(paths["x"]).read_bytes() == b"item_id\n7\n"


def test_local_paths_that_look_like_addresses_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(map(is_address, ("gs:/b", "memory:/x", "C:/x", "C://x", "a/s3://x", "://x", "gs:", "data:text,x")))
    assert all(map(is_address, ("gs://b/x", "s3://b", "abfss://c@a.dfs/x", "hf://datasets/x", "file:///x")))
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "memory:", written(".csv"))
    dataset = prepare(config_of("memory:", ".csv", tmp_path), tmp_path / "data")
    assert len(dataset.catalogue) == 30
    paths = {"items": "memory:/items.csv", "interactions": "gs://b/x y#?.csv", "schema": "schema.yaml"}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"data": {"format": "table", **paths}}))
    loaded = load_config(tmp_path / "x.yaml").data
    assert loaded.items == str(tmp_path / "memory:" / "items.csv") and loaded.interactions == "gs://b/x y#?.csv"


def test_what_belongs_together_is_brought_together(memory: MemoryFileSystem, tmp_path: Path) -> None:
    header, *rows = "user_id:token\titem_id:token\ttimestamp:float\n", *[f"{n % 4}\t{n % 9}\t{n}\n" for n in range(40)]
    files = {
        f"x.{part}.inter": (header + "".join(rows[at::3])).encode()
        for at, part in enumerate(("train", "valid", "test"))
    }
    files["x.item"] = ("item_id:token\ttitle:token_seq\n" + "".join(f"{n}\tFilm {n}\n" for n in range(9))).encode()
    files["schema.yaml"] = yaml.safe_dump({"title": "title", "fields": {"title": "text"}}).encode()
    put(tmp_path / "shop", files)
    upload(memory, files)
    names = {"items": "x.item", "interactions": "x.valid.inter", "schema": "schema.yaml"}
    for where, folder in ((str(tmp_path / "shop"), "here"), ("memory://shop", "there")):
        prepare(
            DataConfig(format="recbole", **{key: f"{where}/{name}" for key, name in names.items()}), tmp_path / folder
        )
    report = json.loads((tmp_path / "there" / "report.json").read_text())
    assert report["interactions"]["read"] == 40
    assert "memory://shop/x.valid.inter: x.train.inter, x.valid.inter, x.test.inter are read together" in str(report)
    for name in ("items.parquet", "interactions.parquet"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    # Another of the three is another version.
    config = DataConfig(format="recbole", **{key: f"memory://shop/{name}" for key, name in names.items()})
    before = addresses.versions(config)
    upload(memory, {"x.test.inter": files["x.test.inter"] + b"1\t1\t99\n"})
    assert addresses.versions(config) == before
    addresses.forget()
    after = addresses.versions(config)
    assert {key for key in before if before[key] != after[key]} == {"interactions"}


def test_samples_of_the_reference(memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = unirec_files.write(tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    here = load_config(Path(__file__).parents[2] / "configs" / "unirec.yaml").data
    upload(memory, {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()})
    keys = ("items", "interactions", "inter", "reviews")
    moved = {key: "memory://shop/" + str(Path(getattr(here, key)).relative_to(data)) for key in keys}
    there = DataConfig(**{**vars(here), **moved})
    for config, folder in ((here, "here"), (there, "there")):
        prepare(config, tmp_path / folder)
    for name in ("items.parquet", "interactions.parquet"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    audit = importlib.import_module("nqf.audit")
    (tmp_path / "there.yaml").write_text(yaml.safe_dump({"data": to_tree(there)}))
    with contextlib.suppress(SystemExit):
        audit.main([str(tmp_path / "there.yaml")])


ADDRESS = f"bucket://me:{SECRET}@shop"


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("refuses", r"no permission to read it"),
        ("fails", r"could not be read \(RuntimeError: no answer to bucket://\*\*\*@shop for \*\*\*\)"),
        ("breaks", r"could not be read \(ConnectionResetError: the line was cut\)"),
        ("ends early", r"items\.csv broke off after 1,\d+ of 1,\d+ bytes; run the command again"),
        ("changes", r"changed while it was read; run the command again"),
    ],
)
def test_a_file_system_that_fails(does: str, said: str, bucket: type[Bucket], tmp_path: Path) -> None:
    fill(bucket)
    config = config_of(ADDRESS, ".csv", tmp_path)
    assert len(prepare(config, tmp_path / "data").catalogue) == 30
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    bucket.does = does
    with pytest.raises(DataError, match=rf"^bucket://\*\*\*@shop/items\.csv: {said}") as error:
        prepare(config, tmp_path / "data")
    assert SECRET not in "".join(traceback.format_exception(error.value))
    # What was there before stays, and nothing is left beside it.
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "schema.yaml"]


def test_addresses_that_lead_nowhere(memory: MemoryFileSystem, tmp_path: Path) -> None:
    def refused(address: str, pattern: str) -> None:
        config = DataConfig(format="table", items=address, interactions="x", schema="y")
        with pytest.raises(DataError, match=pattern):
            prepare(config, tmp_path / "data")
        assert not any(tmp_path.iterdir())

    refused("memory://shop/none.csv", r"^memory://shop/none\.csv: no such file or folder; fix the address$")
    refused("nosuch://b/x.csv", r"^nosuch://b/x\.csv: could not be read \(ValueError: Protocol not known: nosuch\)")
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")):
        if importlib.util.find_spec(package) is None:
            refused(f"{protocol}://b/x.csv", rf"^{protocol}://b/x\.csv: .*package that is not installed \(.*{package}")


def test_two_readers_at_once(memory: MemoryFileSystem, tmp_path: Path) -> None:
    """They read one object of one file system, whose place is shared."""
    content = random.Random(0).randbytes(40_000_000)
    memory.pipe_file("/big.bin", content)

    def read(number: int) -> bool:
        (tmp_path / str(number)).mkdir()
        with addresses.local({"x": "memory://big.bin"}, tmp_path / str(number)) as (paths, _):
            return Path(paths["x"]).read_bytes() == content

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


@given(st.text(max_size=60))
def test_masks_are_stable_and_leave_what_is_no_address(text: str) -> None:
    assert masked(masked(text)) == masked(text)
    assert masked(text) == text or "://" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:SEC/RET@bucket/a@b.csv", "s3://***@bucket/a@b.csv"),
        ("https://user:p@w@host/x", "https://***@host/x"),
        ("https://TOKEN@host/x.csv", "https://***@host/x.csv"),
        ("https://h/x.csv?X-Amz-Signature=abc&b=c: no such file", "https://h/x.csv?***: no such file"),
        ("nqf train --data.items=https://u:p@h/x?y 'ftp://u:p@h'", "nqf train --data.items=https://***@h/x?*** 'ftp://***@h'"),
        ("abfs://c/x?sv=1&sig=abc; fix", "abfs://c/x?***; fix"),
        # No credentials.
        *((same, same) for same in (
            "s3://bucket/what?.csv: line 3", "abfs://container@account.dfs.core.windows.net/x", "hdfs://host:9000/a@b",
            "http://[::1]:8000/a@b.csv", "gs://b/x.csv: column 'a@b.c'", "gs://b/date=2024/x*?#.csv", "me@host: gs://b",
        )),
    ],
)  # fmt: skip
def test_credentials_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


def configuration(folder: Path, where: str, **options: Any) -> Path:
    tree = yaml.safe_load(TINY.read_text())
    tree["data"] = {"format": "table", **{name: f"{where}/{name}.csv" for name in TABLES}, "schema": "schema.yaml"}
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | options))
    return folder / "config.yaml"


def trained(folder: Path, *options: str) -> None:
    train.main([*options, "--run", str(folder / "run"), "--stage", "fields"])


def test_a_changed_table_is_noticed_and_a_lost_one_is_not_missed(
    memory: MemoryFileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = written(".csv")
    upload(memory, files)
    config = str(configuration(tmp_path, "memory://shop"))
    trained(tmp_path, "--config", config)
    assert "running: it has not been run" in capsys.readouterr().out
    saved = load_config(tmp_path / "run" / "config.yaml").data
    assert (saved.items, saved.interactions) == ("memory://shop/items.csv", "memory://shop/interactions.csv")
    trained(tmp_path, "--config", config)
    assert "up to date" in capsys.readouterr().out
    # As many bytes, other ones.
    upload(memory, {"items.csv": files["items.csv"].replace(b"Thing 7", b"Thing 8")})
    trained(tmp_path)
    assert "running: version of data.items changed" in capsys.readouterr().out
    assert "Thing 8" in str(pl.read_parquet(tmp_path / "run" / "data" / "items.parquet")["name"][7])
    # Gone: the run stays what it is, which is said; who only uses it does not ask.
    MemoryFileSystem.store.clear()
    trained(tmp_path)
    told = capsys.readouterr()
    assert "up to date" in told.out
    assert told.err.count("memory://shop/items.csv: no such file or folder; fix the address; what was read of it") == 1
    monkeypatch.setattr(addresses, "versions", lambda config: pytest.fail("asked"))
    run = open_run(tmp_path / "run", Console(quiet=True))
    assert require(run, "fields")["items"] == 30 and len(run.dataset.catalogue) == 30


def test_a_table_that_changes_under_the_stage_is_told(
    bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(bucket)
    fields = importlib.import_module("nqf.stages.fields")
    whole = fields.prepare

    def late(*arguments: Any) -> Any:
        bucket.version = 2
        return whole(*arguments)

    config = str(configuration(tmp_path, "bucket://shop"))
    with monkeypatch.context() as patch:
        patch.setattr(fields, "prepare", late)
        with pytest.raises(StageError, match=r"version of data\.items changed while stage 'fields' was reading; run"):
            trained(tmp_path, "--config", config)
    assert not (tmp_path / "run" / "fields" / "stage.json").exists()
    trained(tmp_path, "--config", config)
    assert (tmp_path / "run" / "fields" / "stage.json").is_file()


def test_versions_follow_the_content_where_nothing_else_tells_them(bucket: type[Bucket], tmp_path: Path) -> None:
    fill(bucket)
    config = Config(data=config_of("bucket://shop", ".csv", tmp_path))
    bucket.version = None
    versions = []
    for content in (b"a,b\n", b"a,c\n", b"a,b\n"):
        bucket.files["shop/items.csv"] = content
        addresses.forget()
        versions.append(parts_of(config, FIELDS, tmp_path)["version of data.items"])
    assert versions[0] == versions[2] != versions[1]
    # Asked once between two of them, and not at all where that is not wanted.
    asked = bucket.asked
    assert parts_of(config, FIELDS, tmp_path)["version of data.items"] == versions[2]
    assert not [key for key in parts_of(config, FIELDS, tmp_path, ask=False) if key.startswith("version")]
    assert bucket.asked == asked


def test_credentials_are_written_nowhere(
    bucket: type[Bucket], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(bucket)
    bucket.files["shop/vectors.json"] = json.dumps({f"{row:03d}": [1.0, row] for row in range(29)}).encode()
    config = configuration(tmp_path, ADDRESS)
    arguments = ["--config", str(config), "--data.candidates", f"{ADDRESS}/vectors.json"]
    monkeypatch.setattr("sys.argv", ["nqf", *arguments])
    assert SECRET not in importlib.import_module("nqf.stages.assess").command_line()
    trained(tmp_path, *arguments)
    told = capsys.readouterr()
    assert "bucket://***@shop/vectors.json: 1 items have no embedding in it" in told.out
    assert "bucket://***@shop/items.csv: 1,432 bytes are copied here" in told.err
    assert SECRET not in told.out + told.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    # Fresh under the same credentials and under others; the run by itself has none, and says so when it needs them.
    for others in (arguments, [argument.replace(SECRET, "another") for argument in arguments]):
        trained(tmp_path, *others)
        assert "up to date" in capsys.readouterr().out
    trained(tmp_path)
    told = capsys.readouterr()
    assert "up to date" in told.out and "its credentials were not written into the run" in told.err
    with pytest.raises(DataError, match=r"^bucket://\*\*\*@shop/items.csv: its credentials were not written into"):
        trained(tmp_path, "--fields.text_width", "8", "--data.min_interactions", "4")
    with pytest.raises(SystemExit):
        trained(tmp_path, *arguments, "--help", "data")
    assert SECRET not in "".join(capsys.readouterr())


def test_inspect_and_fit_read_addresses(
    memory: MemoryFileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(memory, written(".csv") | {"schema.yaml": yaml.safe_dump(SCHEMA).encode()})
    tables = [f"memory://shop/{name}.csv" for name in TABLES]
    data_command.main(["inspect", tables[0], "--interactions", tables[1], "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "memory://shop/items.csv" in out and "memory://shop/interactions.csv" in out
    suggested = load_config(tmp_path / "out" / "config.yaml").data
    assert [suggested.items, suggested.interactions] == tables
    assert len(prepare(suggested, tmp_path / "data").catalogue) == 30
    for schema in (None, "memory://shop/schema.yaml"):
        data, sizes = _data(tables, ColumnsConfig(), schema, tmp_path / "schema.yaml", Console(quiet=True))
        assert [data["items"], data["interactions"]] == tables and sizes[0] == 30
    assert _on_disk(tables[0], tmp_path / "x") == tables[0]
    with pytest.raises(DataError, match=r"gs:/b/x\.csv: no such file; an address is given as text"):
        _on_disk(Path("gs://b/x.csv"), tmp_path / "x")
    with pytest.raises(DataError, match=r"^memory://shop/none\.csv: no such file"):
        data_command.main(["inspect", "memory://shop/none.csv"])


def test_pictures_beside_a_table_are_named_by_its_address(memory: MemoryFileSystem, tmp_path: Path) -> None:
    items = frames()["items"].with_columns(pl.concat_str(pl.lit("pics/"), "item_id", pl.lit(".png")).alias("picture"))
    upload(memory, {**written(".csv"), "items.csv": items.write_csv().encode()})
    config = config_of("memory://shop", ".csv", tmp_path)
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump({"fields": {"name": "text", "picture": "image"}}))
    prepare(config, tmp_path / "data")
    assert pl.read_parquet(tmp_path / "data" / "items.parquet")["picture"][0] == "memory://shop/pics/000.png"


class Site(http.server.SimpleHTTPRequestHandler):
    """A folder as a website; what is called cut.csv breaks off."""

    def log_message(self, *arguments: Any) -> None:
        pass

    def send_head(self) -> Any:
        if self.path.startswith("/private"):
            self.send_error(403)
            return None
        if self.path.startswith("/cut.csv") and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"item_id\n1\n")
            self.close_connection = True
            return None
        return super().send_head()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec opens websites with aiohttp, which is not installed")
    handler = functools.partial(Site, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_website(site: str, tmp_path: Path) -> None:
    put(tmp_path / "site", written(".csv.gz") | {"cut.csv": b"x" * 1_000})
    config = config_of(site, ".csv.gz", tmp_path)
    signed = DataConfig(**{**vars(config), "items": f"{site}/items.csv.gz?X-Signature={SECRET}"})
    addresses.forget()
    here = prepare(config_of(str(tmp_path / "site"), ".csv.gz", tmp_path), tmp_path / "here")
    there = prepare(signed, tmp_path / "there")
    assert there.catalogue.item_ids == here.catalogue.item_ids
    for name in ("items.parquet", "interactions.parquet"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    before = addresses.versions(signed)
    os.utime(tmp_path / "site" / "items.csv.gz", (1, 1))
    addresses.forget()
    after = addresses.versions(signed)
    assert before["items"] != after["items"] and before["interactions"] == after["interactions"]
    for name, said in (
        ("none.csv", "no such file or folder"),
        ("private.csv", "no permission to read it"),
        ("cut.csv", "could not be read|broke off after"),
    ):
        wrong = DataConfig(**{**vars(config), "items": f"{site}/{name}?token={SECRET}"})
        with pytest.raises(DataError, match=rf"^{re.escape(site)}/{name}\?\*\*\*: ({said})") as error:
            prepare(wrong, tmp_path / "wrong")
        assert SECRET not in str(error.value)
    with pytest.raises(DataError, match=r"could not be read"):
        prepare(DataConfig(**{**vars(config), "items": "http://127.0.0.1:9/items.csv"}), tmp_path / "wrong")


def test_status_of_a_run_whose_address_does_not_answer(bucket: type[Bucket], tmp_path: Path) -> None:
    fill(bucket)
    trained(tmp_path, "--config", str(configuration(tmp_path, "bucket://shop")))
    bucket.does = "refuses"
    addresses.forget()
    assert status(load_config(tmp_path / "run" / "config.yaml"), FIELDS, tmp_path / "run") == ""
