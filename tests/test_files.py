"""Whole writes and digests: what is there before, what is there after, and what a failure leaves."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nqf import files

ROOT = Path(__file__).parents[1]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.whole(path, "w") as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path, record: Callable[..., None]) -> None:
    code = (
        "import resource, signal, sys; from nqf import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "files.write_text(sys.argv[1], 'x' * 5000)"
    )
    path = tmp_path / "a.txt"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and f"nothing was written: '{path}'" in done.stderr
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    record(
        "a disk that is full when a file is written whole",
        tried=1,
        survived=1,
        seen="an error with the file; the old one stays and nothing half written",
    )


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("mine")
    link.symlink_to(target)
    files.write_text(link, "new")
    assert target.read_text() == "mine" and link.read_text() == "new" and not link.is_symlink()


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "a[1]*.txt"
    code = (
        "import os, sys; from nqf import files\n"
        "with files.whole(sys.argv[1], 'w') as file: file.write('half'); file.flush(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT)
    (left,) = tmp_path.iterdir()
    mine = tmp_path / "a[1]*.txt.tmp"
    mine.write_text("mine")
    files.write_text(path, "whole")
    assert not left.exists() and path.read_text() == "whole" and mine.read_text() == "mine"


def test_digests_are_of_the_present_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NQF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a"
    found = set()
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        # As an attacker or a clock that goes back would leave it.
        os.utime(path, ns=(10**18, 10**18))
        found.add(files.sha256(path))
    assert len(found) == 3
    path.unlink()
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    assert files.sha256(path) in found


def test_a_version_of_a_file_is_read_once_by_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NQF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_SETTLED_NS", -1)
    path = tmp_path / "a"
    path.write_bytes(b"content")
    expected = files.sha256(path)
    files._sha256.cache_clear()
    read = []
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *arguments: read.append(arguments))
    assert files.sha256(path) == expected and not read


def test_digests_do_without_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("NQF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a"
    path.write_bytes(b"")
    assert files.sha256(path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    monkeypatch.setenv("NQF_CACHE", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "digests.sqlite").write_text("not a database, but long enough to be read as one" * 40)
    files._sha256.cache_clear()
    assert files.sha256(path).startswith("e3b0c442")


def test_threads_may_ask_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NQF_CACHE", str(tmp_path / "cache"))
    paths = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(paths):
        path.write_text(str(number))
    found: list[str] = []
    threads = [threading.Thread(target=lambda path=path: found.append(files.sha256(path))) for path in paths * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 100 and len(set(found)) == 20
