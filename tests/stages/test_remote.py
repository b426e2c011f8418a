"""Run folders at addresses: what a command makes there is what it makes here, and no failure leaves a mixture."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem
from rich.console import Console

import nqf
from nqf import compare, evaluate, export, items, recommend, report
from nqf.config import Config, ConfigError
from nqf.data import addresses
from nqf.data.errors import DataError
from nqf.files import InUseError
from nqf.serving.recommender import Recommender
from nqf.stages import folder as folders
from nqf.stages import graph
from nqf.stages.records import StageError
from nqf.stages.remote import LIST, STAGED, RunChangedError, local_run
from nqf.stages.run import Run, open_run

SECRET = "hush5678"
ROOT = Path(__file__).parents[2]
ROAD = tuple(name for name in graph.NAMES if name != "sasrec")


class Bucket(AbstractFileSystem):
    """A store: names and contents, no folders, no copies inside. Users have passwords.

    Attributes:
      files: Contents by path, without what stands before an @.
      before: Called before something is written or deleted, with what and where.
      got: Paths that were read.
    """

    protocol = "bucket"
    files: dict[str, bytes] = {}  # noqa: RUF012
    before: Callable[[str, str], None] = staticmethod(lambda does, path: None)
    got: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("bucket://").rpartition("@")[2].rstrip("/")

    def find(self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **_: Any) -> Any:
        Bucket.before("list", path)
        path = self._strip_protocol(path)
        found = {name: self.info(name) for name in sorted(self.files) if name == path or name.startswith(f"{path}/")}
        return found if detail else list(found)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.files:
            return {"name": path, "size": len(self.files[path]), "type": "file", "ETag": hash(self.files[path])}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        found = self.find(path, detail=True)
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        path = self._strip_protocol(path)
        if mode == "rb":
            Bucket.got.append(path)
            if path not in self.files:
                raise FileNotFoundError(path)
            return io.BytesIO(self.files[path])
        Bucket.before("write", path)
        return Upload(path)

    def rm_file(self, path: str) -> None:
        Bucket.before("delete", path)
        if self.files.pop(self._strip_protocol(path), None) is None:
            raise FileNotFoundError(path)


class Upload(io.BytesIO):
    """What is there when it is whole."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def close(self) -> None:
        if not self.closed:
            Bucket.files[self.path] = self.getvalue()
        super().close()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty places at every address of these tests, and a machine with an empty cache."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    for name, value in {"files": {}, "got": [], "before": staticmethod(lambda does, path: None)}.items():
        monkeypatch.setattr(Bucket, name, value)
    machine(monkeypatch, tmp_path, "a")
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("NQF_CACHE", str(tmp_path / f"machine-{name}"))


@contextlib.contextmanager
def on_machine(tmp_path: Path, name: str) -> Iterator[None]:
    before = os.environ["NQF_CACHE"]
    os.environ["NQF_CACHE"] = str(tmp_path / f"machine-{name}")
    try:
        yield
    finally:
        os.environ["NQF_CACHE"] = before


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a local run folder, without locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def stored(address: str) -> dict[str, bytes]:
    """Files at an address, without what nqf keeps beside them."""
    system, root = addresses.open_system(address)
    found = {path.removeprefix(root).lstrip("/"): system.cat_file(path) for path in system.find(root)}
    return {name: content for name, content in found.items() if name != LIST and not name.startswith(STAGED)}


def write(address: str, **texts: str | None) -> None:
    """Writes texts into a run, or deletes where there is None, `__` for a slash."""
    with local_run(address, writes=True) as (folder, _):
        put(folder, **texts)


def put(folder: Path, **texts: str | None) -> None:
    folders.mark_run_folder(folder)
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def read(address: str) -> dict[str, bytes]:
    with local_run(address) as (folder, saved):
        assert saved is None
        return contents(folder)


def addresses_of(tmp_path: Path) -> dict[str, str]:
    return {"memory": "memory://b/r", "file": f"file://{tmp_path}/store/r", "bucket": "bucket://b/r"}


@pytest.mark.parametrize("kind", ["memory", "file", "bucket"])
def test_the_same_files_as_a_local_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, here = addresses_of(tmp_path)[kind], tmp_path / "here"
    for margin, crash in ((0.1, ""), (0.3, "joint"), (0.1, ""))[: 3 if kind == "bucket" else 1]:
        ran = trained(monkeypatch, str(here), margin, crash)
        with on_machine(tmp_path, f"{margin}{crash}"):
            assert trained(monkeypatch, address, margin, crash) == ran != []
        there, expected = stored(address), contents(here)
        assert there.keys() == expected.keys() and len(there) > 20
        system, root = addresses.open_system(address)
        assert not [name for name in system.find(root) if STAGED in name]
        different = {name for name in there if there[name] != expected[name]}
        assert all(name.endswith("stage.json") for name in different)
        assert all(without_times(there[name]) == without_times(expected[name]) for name in different)
        with on_machine(tmp_path, "reader"):
            assert read(address) == there
    # Nothing is left beside it, and nothing is called like an address.
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith("machine-")}
    assert names == {"here"} | ({"store"} if kind == "file" else set())


class Crash(Exception):
    pass


def trained(monkeypatch: pytest.MonkeyPatch, run: str, margin: float, crash: str) -> list[str]:
    """Runs the road with stages that cost nothing, each writing what it is declared to; those that ran."""
    ran: list[str] = []

    def make(run: Run, stage: Any) -> dict[str, Any]:
        ran.append(stage.name)
        own = {"fields": ["manifest.json"], "tokens": ["tokens.npy"]}.get(stage.name, [])
        own += ["checkpoints/1/params"] if stage.program else []
        for name in (*(f"{name}/table" for name in stage.also), *(f"{stage.name}/{name}" for name in own)):
            (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (run.folder / name).write_text(f"{stage.name} {run.config.item.margin}")
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write(f"{stage.name}\n")
        if stage.name == crash:
            raise Crash
        return {"best_step": 1}

    monkeypatch.setattr(graph, "_make", make)
    config = Config(item=dataclasses.replace(Config().item, margin=margin))
    with contextlib.suppress(Crash), local_run(run, writes=True) as (folder, saved):
        opened = graph.open_for_training(config, folder, Console(quiet=True), stages=ROAD)
        opened = dataclasses.replace(opened, saved=saved)
        for name in ROAD:
            graph.run_stage(opened, name)
    return ran


def without_times(record: bytes) -> dict[str, Any]:
    tree = json.loads(record)
    return {"parts": tree["parts"], "files": tree["files"]}


def test_only_what_differs_is_copied(tmp_path: Path) -> None:
    write("bucket://b/r", config__yaml="1", item__a="a", item__b="b")
    with on_machine(tmp_path, "b"):
        assert read("bucket://b/r").keys() == {".nqf.json", "config/yaml", "item/a", "item/b"}
    write("bucket://b/r", item__b="other", item__c="c", item__a=None)
    Bucket.got.clear()
    with on_machine(tmp_path, "b"):
        found = read("bucket://b/r")
        assert found["item/b"] == b"other" and found.keys() == {".nqf.json", "config/yaml", "item/b", "item/c"}
        assert sorted(Bucket.got) == [f"b/r/{LIST}", "b/r/item/b", "b/r/item/c"]
        Bucket.got.clear()
        read("bucket://b/r")
        assert Bucket.got == [f"b/r/{LIST}"]
        # A copy that was damaged or tidied away is made good.
        with local_run("bucket://b/r") as (folder, _):
            (folder / "item" / "c").unlink()
            (folder / "item" / "b").write_text("?")
            (folder / "stray").write_text("?")
        assert read("bucket://b/r") == found


class Line:
    """What a line does that is cut after some operations; before each of them a reader elsewhere looks, if asked."""

    def __init__(self, operations: int, look: Callable[[], bool] | None) -> None:
        self.left, self.look, self.seen = operations, look, list[bool]()

    def __call__(self, does: str, path: str) -> None:
        if does == "list":
            return
        if self.look:
            Bucket.before = staticmethod(lambda does, path: None)
            self.seen.append(self.look())
            Bucket.before = staticmethod(self)
        self.left -= 1
        if self.left < 0:
            raise ConnectionResetError("the line was cut")


def test_an_upload_that_breaks_off_anywhere(tmp_path: Path) -> None:
    """Before and after every operation a reader elsewhere sees one of both runs, and any machine can continue."""
    write("bucket://b/r", config="old", item__data="old", item__stage="old", user__gone="old", same="same")
    old, start, cut = read("bucket://b/r"), dict(Bucket.files), True
    new = {name: b"new" if text == b"old" else text for name, text in old.items() if name != "user/gone"} | {
        "more": b"1"
    }
    shutil.copytree(tmp_path / "machine-a", tmp_path / "before")

    def is_new(machine: str) -> bool:
        with on_machine(tmp_path, machine):
            found = read("bucket://b/r")
        assert found in (old, new), found
        return found == new

    operations = -1
    while cut:
        operations, cut = operations + 1, False
        Bucket.files = dict(start)
        shutil.rmtree(tmp_path / "machine-a")
        shutil.copytree(tmp_path / "before", tmp_path / "machine-a")
        line = Line(operations, (lambda: is_new("b")) if operations % 4 == 0 else None)
        Bucket.before = staticmethod(line)
        try:
            write("bucket://b/r", config="new", item__data="new", item__stage="new", user__gone=None, more="1")
        except DataError as error:
            assert "ConnectionResetError: the line was cut" in str(error) and "what was made is in" in str(error)
            cut = True
        Bucket.before = staticmethod(lambda does, path: None)
        # Once it is the new one, it stays so.
        assert line.seen == sorted(line.seen)
        expected = new if is_new("c") else old
        if cut and operations % 3 == 0:
            with on_machine(tmp_path, "d"):
                write("bucket://b/r", other="d")
                assert read("bucket://b/r") == stored("bucket://b/r") == expected | {"other": b"d"}
            assert not [name for name in Bucket.files if STAGED in name]
        else:
            write("bucket://b/r")
            assert read("bucket://b/r") == stored("bucket://b/r") == new
    assert operations > 10 and expected is new


def test_the_second_of_two_writers_is_told(tmp_path: Path) -> None:
    write("bucket://b/r", config="old")
    with on_machine(tmp_path, "b"):
        with pytest.raises(RunChangedError, match=r"^bucket://b/r: somebody else changed it") as raised:
            with local_run("bucket://b/r", writes=True) as (folder, saved):
                put(folder, config="b", item__b="b")
                with on_machine(tmp_path, "a"):
                    write("bucket://b/r", config="a", item__a="a")
                there = dict(Bucket.files)
                with pytest.raises(RunChangedError):
                    saved()
        assert str(folder) in str(raised.value) and contents(folder)["config"] == b"b"
        assert {name: Bucket.files[name] for name in there} == there
        # Nothing takes the place of what was made, until it is out of the way.
        for writes in (False, True):
            with pytest.raises(RunChangedError, match=rf"Keep {folder} under another name"):
                with local_run("bucket://b/r", writes=writes):
                    pass
        folder.rename(tmp_path / "kept")
        assert read("bucket://b/r") == stored("bucket://b/r")
        assert read("bucket://b/r")["config"] == b"a"


def test_two_new_runs_at_one_address(tmp_path: Path) -> None:
    with pytest.raises(RunChangedError):
        with local_run("bucket://b/r", writes=True) as (folder, _):
            put(folder, config="a")
            with on_machine(tmp_path, "b"):
                write("bucket://b/r", config="b")
    assert stored("bucket://b/r")["config"] == b"b"
    assert contents(folder)["config"] == b"a"


def test_who_was_cut_off_after_taking_everything_is_in_nobodys_way(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    with pytest.raises(Killed), local_run("bucket://b/r", writes=True) as (folder, saved):
        put(folder, config="a")
        saved()
        raise Killed
    with on_machine(tmp_path, "b"):
        write("bucket://b/r", config="b")
    assert read("bucket://b/r")["config"] == b"b"
    # With something that was not taken, the same machine continues from there.
    with pytest.raises(Killed), local_run("bucket://b/r", writes=True) as (folder, saved):
        put(folder, config="c", gone="1")
        raise Killed
    assert read("bucket://b/r")["config"] == b"c" and stored("bucket://b/r")["config"] == b"b"
    write("bucket://b/r")
    assert stored("bucket://b/r")["config"] == b"c"


def test_an_error_takes_what_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StageError, match=r"^bucket://b/r/item: stopped$"):
        with local_run("bucket://b/r", writes=True) as (folder, _):
            put(folder, config="a")
            raise StageError(f"{folder}/item: stopped")
    assert stored("bucket://b/r")["config"] == b"a"

    def fails(does: str, path: str) -> None:
        if does == "write":
            raise PermissionError(path)

    # A line that is down for a while ends no training.
    with local_run("bucket://b/r", writes=True) as (folder, saved):
        put(folder, config="b")
        Bucket.before = staticmethod(fails)
        saved()
        assert "no permission to write it" in caplog.text and str(folder) in caplog.text
        Bucket.before = staticmethod(lambda does, path: None)
        saved()
        assert stored("bucket://b/r")["config"] == b"b"


def test_what_nqf_did_not_make_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Bucket.files = {"b/shop/orders.csv": b"x", "b/shop/config.yaml": b"mine: true"}
    for writes in (False, True):
        with pytest.raises(StageError, match=r"^bucket://b/shop: not a run folder and not empty"):
            with local_run("bucket://b/shop", writes=writes):
                pass
    with pytest.raises(DataError, match=r"^bucket://b/shop/orders.csv: a file, not a run folder"):
        read("bucket://b/shop/orders.csv")
    assert Bucket.files == {"b/shop/orders.csv": b"x", "b/shop/config.yaml": b"mine: true"}
    assert not [path for path in tmp_path.rglob("*") if path.name == "orders.csv"]
    # In a run: what lies there is as in a local folder, and what comes later is not written over.
    write("bucket://b/r", config="1")
    Bucket.files |= {"b/r/notes.txt": b"mine", "b/r/user/notes.txt": b"mine"}
    with local_run("bucket://b/r", writes=True) as (folder, _):
        with pytest.raises(StageError, match="user: not made by nqf"):
            folders.claim(folder, "user")
        put(folder, config="2")
        shutil.rmtree(folder / "user")
        Bucket.files["b/r/user/notes.txt"] = b"changed"
    assert Bucket.files["b/r/notes.txt"] == b"mine" and Bucket.files["b/r/user/notes.txt"] == b"changed"
    with pytest.raises(RunChangedError):
        with local_run("bucket://b/r", writes=True) as (folder, _):
            put(folder, README="nqf")
            Bucket.files["b/r/README"] = b"mine"
    assert Bucket.files["b/r/README"] == b"mine"


def test_a_run_that_was_copied_by_hand(tmp_path: Path) -> None:
    put(tmp_path / "here", config="1", item__a="a", item__b="b")
    expected = contents(tmp_path / "here")
    Bucket.files = {f"b/r/{name}": content for name, content in expected.items()}
    assert read("bucket://b/r") == expected and f"b/r/{LIST}" not in Bucket.files
    Bucket.got.clear()
    assert read("bucket://b/r") == expected and not Bucket.got
    Bucket.files["b/r/item/a"] = b"other"
    assert read("bucket://b/r")["item/a"] == b"other" and Bucket.got == ["b/r/item/a"]
    write("bucket://b/r", item__b="new", item__a=None)
    expected = {name: content for name, content in expected.items() if name != "item/a"} | {"item/b": b"new"}
    with on_machine(tmp_path, "b"):
        assert read("bucket://b/r") == stored("bucket://b/r") == expected


def test_what_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    write("bucket://b/r", config="1", item__a="a")
    whole = dict(Bucket.files)
    for wrong in ({"b/r/item/a": b"b"}, {"b/r/item/a": None}):
        Bucket.files = {name: content for name, content in (whole | wrong).items() if content is not None}
        with on_machine(tmp_path, f"{len(Bucket.files)}"):
            with pytest.raises(DataError, match=rf"^bucket://b/r: .*then delete {LIST} there"):
                read("bucket://b/r")
            del Bucket.files[f"b/r/{LIST}"]
            assert read("bucket://b/r") == stored("bucket://b/r")
    Bucket.files = whole | {f"b/r/{LIST}": b"{"}
    with pytest.raises(DataError, match=rf"{LIST} is not a list of files"):
        read("bucket://b/r")
    # Neither leads a list out of the copy.
    for name in ("../../x", "/tmp/x", "a//x"):
        entry = {"size": 1, "sha256": "0" * 64}
        Bucket.files = {f"b/r/{LIST}": json.dumps({"files": {name: entry}, "gone": []}).encode()}
        with pytest.raises(DataError, match="which no run folder holds"):
            read("bucket://b/r")


def test_one_writer_here_and_any_readers(tmp_path: Path) -> None:
    write("memory://b/r", config="1")
    with local_run("memory://b/r", writes=True) as (folder, _):
        with pytest.raises(InUseError, match=rf"^memory://b/r: in use by process {os.getpid()}"):
            write("memory://b/r")
        put(folder, config="2")
        assert read("memory://b/r")["config"] == b"2"
    assert stored("memory://b/r")["config"] == b"2"
    # Nobody brings anything into a copy that somebody works on.
    with pytest.raises(RunChangedError):
        with local_run("memory://b/r", writes=True) as (folder, _):
            with on_machine(tmp_path, "b"):
                write("memory://b/r", config="3")
            assert read("memory://b/r")["config"] == b"2"
            put(folder, config="4")


def test_credentials_are_written_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    address = f"bucket://me:{SECRET}@b/r"
    write(address, config="1")
    with on_machine(tmp_path, "b"):
        read(address)

    def fails(does: str, path: str) -> None:
        raise RuntimeError(f"no answer to bucket://me:{SECRET}@b for {SECRET}")

    Bucket.before = staticmethod(fails)
    with pytest.raises(DataError, match=r"^bucket://\*\*\*@b/r: could not be read \(RuntimeError") as error:
        read(address)
    Bucket.before = staticmethod(lambda does, path: None)
    assert SECRET not in str(error.value) + caplog.text and "bucket://***@b/r: " in caplog.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5 and not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert not [name for name, content in Bucket.files.items() if SECRET.encode() in content]


def test_addresses_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for address, said in (
        ("oci://b/r", "its file system needs a package that is not installed"),
        ("nowhere://b/r", "could not be read"),
        ("https://h/r?key=1", "a website, which has no folders"),
    ):
        with pytest.raises(DataError, match=said):
            Recommender.load(address)
    with pytest.raises(StageError, match=r"^memory://b/none: no run here .*--run memory://b/none$"):
        Recommender.load("memory://b/none")
    with pytest.raises(StageError, match=r"gs:/b/r: no such folder; an address is text with two slashes"):
        Recommender.load(Path("gs://b/r"))
    with pytest.raises(StageError, match=r"gs://b/r: an address"):
        open_run("gs://b/r", Console(quiet=True))
    train = importlib.import_module("nqf.train")
    with pytest.raises(ConfigError, match=r"training.distributed: processes of one run share its folder"):
        train.main(["--config", "quickstart", "--run", "memory://b/r", "--training.distributed"])
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "scandir", _refusing(os.scandir))
    with pytest.raises(DataError, match=rf"^file://{locked}: no permission to read it"):
        read(f"file://{locked}")
    assert {path.name for path in tmp_path.iterdir()} <= {"machine-a", "locked"}


def _refusing(scandir: Callable[..., Any]) -> Callable[..., Any]:
    def refused(path: Any = ".") -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    return refused


def test_fit_at_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"u{user}", f"i{(user * 7 + at * at) % 20}", 1_600_000_000 + at) for user in range(20) for at in range(8)]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "time"], orient="row")
    catalogue = pl.DataFrame(
        {"item_id": [f"i{row}" for row in range(20)], "title": [f"Thing {row}" for row in range(20)]}
    )
    for name in ("nqf.stages.assess.assess", "nqf.tools.card.write_card", "nqf.evaluation.results.print_results"):
        monkeypatch.setattr(name, lambda *_: None)
    monkeypatch.setattr(Recommender, "load", lambda run: run)
    ran: list[str] = []
    monkeypatch.setattr(graph, "_make", lambda run, stage: ran.append(stage.name) or {"best_step": 1})
    for _ in range(2):
        assert nqf.fit(catalogue, events, run="memory://b/fit", quiet=True) == "memory://b/fit"
    assert ran == list(ROAD)
    there = stored("memory://b/fit")
    assert {".nqf.json", "config.yaml", "tables/items.parquet", "joint/stage.json"} <= there.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["machine-a"]


@pytest.mark.slow
@pytest.mark.ci
def test_commands_make_the_same_of_an_address(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, address = tmp_path / "tiny", "memory://b/tiny"
    shutil.copytree(tiny_run, here)
    system, _ = addresses.open_system(address)
    for name, content in contents(here).items():
        system.pipe_file(f"/b/tiny/{name}", content)
    out = {str(here): tmp_path / "here", address: tmp_path / "there"}
    for run, folder in out.items():
        folder.mkdir()
        with on_machine(tmp_path, "b"):
            evaluate.main([run, "--split", "valid"])
        items.main(["remove", run, str(_table(tmp_path, tiny_run))])
        recommend.main([run, "--all", str(folder / "all.parquet")])
        export.main([run, "--format", "index", "--output", str(folder / "index")])
        about = folder / "index" / "index.json"
        about.write_text(about.read_text().replace(f'"run": "{run}"', '"run": ""'))
        with on_machine(tmp_path, "c"):
            report.main([run])
        compare.main([run])
    assert contents(out[str(here)]) == contents(out[address])
    expected, there = contents(here), stored(address)
    assert there.keys() == expected.keys() and {"report.html", "items/items.json"} <= there.keys()
    # They tell the command and its time.
    told = {"eval/valid/results.json", "report.html"}
    assert {name for name in there if there[name] != expected[name]} <= told
    assert f"wrote {address}/report.html" in capsys.readouterr().out
    rec = Recommender.load(address)
    rec.remove_items([rec.item_ids[1]], save=True)
    with on_machine(tmp_path, "d"):
        assert (~Recommender.load(address).available).sum() == 2
    assert rec.save("memory://b/saved") and Recommender.load("memory://b/saved").item_ids == rec.item_ids
    with pytest.raises(ValueError, match="memory://b/saved: there already"):
        rec.save("memory://b/saved")


def _table(tmp_path: Path, run: Path) -> Path:
    path = tmp_path / "gone.csv"
    first = pl.read_parquet(run / "data" / "items.parquet", columns=["item_id"])["item_id"][0]
    path.write_text(f"item_id\n{first}\n")
    return path


@pytest.mark.slow
@pytest.mark.ci
def test_a_machine_that_is_taken_away_resumes_elsewhere(tiny_run: Path, tmp_path: Path) -> None:
    address = f"file://{tmp_path}/store/r"
    shutil.copytree(tiny_run, tmp_path / "store" / "r")
    for name in ("item", "tokens", "user", "joint", "score", "sasrec", "eval", "tensorboard"):
        shutil.rmtree(tmp_path / "store" / "r" / name)
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "store" / "r", whole)

    def start(run: str, machine: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "nqf.train", "--run", run, "--stage", "item", "--item.optim.epochs", "4"]
        # Few steps, as there is a checkpoint after each.
        command += ["--item.optim.batch-size", "256", "--training.save_every_seconds", "0"]
        env = os.environ | {"NQF_CACHE": str(tmp_path / machine)}
        return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)

    process = start(address, "a")
    steps = tmp_path / "store" / "r" / "item" / "checkpoints"
    while not steps.is_dir() or len(list(steps.iterdir())) < 1:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 75, error
    saved = read(address)
    assert not [name for name in saved if name == "item/stage.json"]
    assert [name for name in saved if name.startswith("item/checkpoints/")]
    for run, machine in ((address, "b"), (str(whole), "c")):
        process = start(run, machine)
        error = process.communicate(timeout=600)[1]
        assert process.returncode == 0, error
    there, expected = stored(address), contents(whole)
    parts = [without_times(files["item/stage.json"])["parts"] for files in (there, expected)]
    assert parts[0] == parts[1]
    results = [json.loads(files["item/stage.json"])["result"] for files in (there, expected)]
    times = {"seconds", "wall_seconds", "finished", "items_per_second"}
    plain = [{key: result[key] for key in result.keys() - times} for result in results]
    assert plain[0] == plain[1] and "best_step" in plain[0]
