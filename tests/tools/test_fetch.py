"""`nqf.tools.fetch` against a server on this machine: breaks, changed files, wrong sizes, unsafe archives."""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from nqf.cli import configuration
from nqf.config import load_config
from nqf.data.errors import DataError
from nqf.data.load import prepare
from nqf.tools import data as command
from nqf.tools import download as downloads
from nqf.tools.download import Patience, download, unpack
from nqf.tools.fetch import AMAZON_CATEGORIES, fetch, source_of

FAST = Patience(attempts=3, pause=0.001, timeout=5)


class Publisher:
    """A server whose files and faults a test sets.

    Attributes:
      files: Path to content.
      cut_after: Bytes after which each of the next connections is cut; a connection beyond the list is not.
      failures: Status codes that the next requests get.
      ranges: Whether Range is understood.
      etag: Validator; none if empty.
      announce: Content-Length that is stated instead of the true one; none if -1.
      redirects: Path to the address that it leads to.
      seen: (path, Range header) of every request.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut_after: list[int] = []
        self.failures: list[int] = []
        self.ranges, self.etag, self.announce, self.stall = True, '"1"', None, False
        self.redirects: dict[str, str] = {}
        self.seen: list[tuple[str, str | None]] = []
        self.base = ""


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    state = Publisher()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.seen.append((self.path, self.headers.get("Range")))
            content = state.files.get(self.path)
            if state.failures:
                return self.send_error(state.failures.pop(0))
            if self.path in state.redirects:
                self.send_response(302)
                self.send_header("Location", state.redirects[self.path])
                return self.end_headers()
            if content is None:
                return self.send_error(404)
            start, asked = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            fresh = self.headers.get("If-Range") in (None, state.etag)
            if asked and state.ranges and fresh:
                start = int(asked[1])
                if start >= len(content):
                    return self.send_error(416)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            if state.etag:
                self.send_header("ETag", state.etag)
            if state.announce != -1:
                self.send_header("Content-Length", str((state.announce or len(content)) - start))
            self.end_headers()
            body = content[start:]
            if state.cut_after:
                body = body[: state.cut_after.pop(0)]
            self.wfile.write(body)
            if state.stall:
                threading.Event().wait(1.0)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.base = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


CONTENT = bytes(range(256)) * 4_000


def test_downloads_and_records(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files["/x.bin"] = CONTENT
    steps: list[tuple[int, int | None]] = []
    record = download(f"{publisher.base}/x.bin", tmp_path / "x.bin", progress=lambda *step: steps.append(step))
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert record["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert record == json.loads((tmp_path / "downloads.json").read_text())["x.bin"]
    assert record["url"] == f"{publisher.base}/x.bin" and record["bytes"] == len(CONTENT)
    assert steps[-1] == (len(CONTENT), len(CONTENT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads.json", "x.bin"]
    # What is there and unchanged is not downloaded again; what was altered is.
    download(f"{publisher.base}/x.bin", tmp_path / "x.bin")
    assert len(publisher.seen) == 1
    (tmp_path / "x.bin").write_bytes(CONTENT[:-1] + b"?")
    download(f"{publisher.base}/x.bin", tmp_path / "x.bin")
    assert len(publisher.seen) == 2
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


def test_goes_on_after_every_break(publisher: Publisher, tmp_path: Path) -> None:
    """Many breaks in a row are no reason to give up while bytes arrive."""
    publisher.files["/x.bin"] = CONTENT
    publisher.cut_after = [100_000] * 8
    download(f"{publisher.base}/x.bin", tmp_path / "x.bin", patience=FAST)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert [asked for _, asked in publisher.seen] == [None, *(f"bytes={n}00000-" for n in range(1, 9))]


def test_goes_on_in_the_next_process(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files["/x.bin"] = CONTENT
    publisher.cut_after, publisher.failures = [300_000], []
    url = f"{publisher.base}/x.bin"
    with pytest.raises(
        DataError, match=r"gave up after 1 tries .* 300,000 bytes are kept, and the same command resumes"
    ):
        download(url, tmp_path / "x.bin", patience=Patience(attempts=1))
    assert not (tmp_path / "x.bin").exists()
    download(url, tmp_path / "x.bin", patience=FAST)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert publisher.seen[-1] == ("/x.bin", "bytes=300000-")


@pytest.mark.parametrize("etag", ['"2"', ""])
def test_a_changed_file_is_never_mixed(publisher: Publisher, tmp_path: Path, etag: str) -> None:
    url = f"{publisher.base}/x.bin"
    publisher.files["/x.bin"], publisher.cut_after = CONTENT, [300_000]
    with pytest.raises(DataError):
        download(url, tmp_path / "x.bin", patience=Patience(attempts=1))
    publisher.files["/x.bin"], publisher.etag = CONTENT[::-1], etag
    download(url, tmp_path / "x.bin", patience=FAST)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT[::-1]


def test_a_shorter_file_starts_again(publisher: Publisher, tmp_path: Path) -> None:
    url = f"{publisher.base}/x.bin"
    publisher.files["/x.bin"], publisher.cut_after = CONTENT, [300_000]
    with pytest.raises(DataError):
        download(url, tmp_path / "x.bin", patience=Patience(attempts=1))
    publisher.files["/x.bin"] = CONTENT[:1000]
    download(url, tmp_path / "x.bin", patience=FAST)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT[:1000]


def test_a_server_without_ranges_starts_again(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files["/x.bin"], publisher.ranges, publisher.cut_after = CONTENT, False, [300_000]
    download(f"{publisher.base}/x.bin", tmp_path / "x.bin", patience=FAST)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


def test_a_size_that_never_comes_is_given_up(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files["/x.bin"], publisher.announce = b"short", 10
    with pytest.raises(DataError, match=r"gave up after 3 tries without a further byte"):
        download(f"{publisher.base}/x.bin", tmp_path / "x.bin", patience=FAST)
    assert not (tmp_path / "x.bin").exists()


def test_a_stalled_server_is_given_up(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files["/x.bin"], publisher.announce, publisher.stall = b"short", 10, True
    with pytest.raises(DataError, match=r"gave up after 1 tries .*timed out"):
        download(f"{publisher.base}/x.bin", tmp_path / "x.bin", patience=Patience(attempts=1, timeout=0.1))


def test_passing_and_lasting_failures(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files["/x.bin"], publisher.failures = CONTENT, [503, 429]
    download(f"{publisher.base}/x.bin", tmp_path / "x.bin", patience=FAST)
    assert len(publisher.seen) == 3
    with pytest.raises(DataError, match="HTTP 404 Not Found; see whether the publisher moved the file"):
        download(f"{publisher.base}/y.bin", tmp_path / "y.bin", patience=FAST)
    assert len(publisher.seen) == 4
    with pytest.raises(DataError, match="gave up after 3 tries"):
        download("http://127.0.0.1:9/x.bin", tmp_path / "z.bin", patience=FAST)


def test_a_page_instead_of_an_archive(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files["/x.zip"] = b"<html>log in first</html>"
    with pytest.raises(DataError, match=r"not a .zip file, it starts with b'<html>log"):
        download(f"{publisher.base}/x.zip", tmp_path / "x.zip", patience=FAST)
    assert not (tmp_path / "x.zip").exists()


def test_a_full_disk_is_seen_before(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    publisher.files["/x.bin"] = CONTENT
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match="1,024,000 bytes do not fit on the disk"):
        download(f"{publisher.base}/x.bin", tmp_path / "x.bin", patience=FAST)
    record(
        "a download that does not fit on the disk",
        tried=1,
        survived=1,
        seen="refused before a byte is written",
    )


def test_a_file_stays_the_one_that_was_recorded(publisher: Publisher, tmp_path: Path) -> None:
    """Whatever its publisher or a mirror has by then."""
    publisher.files |= {"/x.bin": CONTENT, "/mirror/x.bin": CONTENT, "/other/x.bin": CONTENT[::-1]}
    download(f"{publisher.base}/x.bin", tmp_path / "x.bin")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(DataError, match=r"not the file that .*downloads.json records .*delete .* to take the new one"):
        download(f"{publisher.base}/other/x.bin", tmp_path / "x.bin")
    assert not (tmp_path / "x.bin").exists()
    download(f"{publisher.base}/mirror/x.bin", tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


def test_a_file_that_was_put_there_is_used(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(CONTENT)
    assert download(f"{publisher.base}/x.bin", tmp_path / "x.bin")["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / "y.zip").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"y.zip: not a .zip file"):
        download(f"{publisher.base}/y.zip", tmp_path / "y.zip")
    assert (tmp_path / "y.zip").read_bytes() == b"<html>" and not publisher.seen


def test_a_size_that_is_not_stated_is_bounded(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.files["/x.bin"], publisher.announce = CONTENT, -1
    monkeypatch.setattr(downloads, "UNSTATED_LIMIT", len(CONTENT))
    download(f"{publisher.base}/x.bin", tmp_path / "x.bin", patience=FAST)
    monkeypatch.setattr(downloads, "UNSTATED_LIMIT", len(CONTENT) - 1)
    publisher.files["/y.bin"] = CONTENT
    with pytest.raises(DataError, match=r"does not say how many bytes it has, and there are more than 1,023,999"):
        download(f"{publisher.base}/y.bin", tmp_path / "y.bin", patience=FAST)
    assert not (tmp_path / "y.bin").exists()


@pytest.mark.parametrize("content", ["{", "[1]", '{"x.bin": 1}', "[" * 100_000], ids=["cut", "list", "number", "deep"])
def test_a_damaged_record_names_its_file(publisher: Publisher, tmp_path: Path, content: str) -> None:
    (tmp_path / "downloads.json").write_text(content)
    with pytest.raises(DataError, match=r"downloads.json: .*; delete it, and the files beside it"):
        download(f"{publisher.base}/x.bin", tmp_path / "x.bin", patience=FAST)


def test_a_disk_that_fills_up_names_the_file(publisher: Publisher, tmp_path: Path) -> None:
    """The limit is the process's own, so the download runs in another one."""
    publisher.files["/x.bin"] = CONTENT
    code = (
        "import resource, sys; from pathlib import Path; from nqf.tools.download import download\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "download(sys.argv[1], Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, f"{publisher.base}/x.bin", str(tmp_path / "x.bin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and f"File too large: '{tmp_path / 'x.bin.part'}'" in done.stderr
    assert len(publisher.seen) == 1


def test_a_redirect_to_a_private_machine_is_refused(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    publisher.files |= {"/x.bin": CONTENT, "/secret": b"of this machine"}
    port = publisher.base.rpartition(":")[2]
    for at, target in enumerate(
        (f"http://localhost:{port}/secret", f"http://127.1:{port}/secret", "file:///etc/passwd")
    ):
        publisher.redirects[f"/{at}"] = target
        with pytest.raises(DataError, match=r"not a public address; NQF_PRIVATE_REDIRECTS=allow|is not allowed"):
            download(f"{publisher.base}/{at}", tmp_path / str(at), patience=FAST)
        assert not (tmp_path / str(at)).exists()
    assert [path for path, _ in publisher.seen] == ["/0", "/1", "/2"]
    monkeypatch.setenv("NQF_PRIVATE_REDIRECTS", "allow")
    download(f"{publisher.base}/0", tmp_path / "0")
    assert (tmp_path / "0").read_bytes() == b"of this machine"
    record(
        "a download that is redirected to this machine or to a file",
        tried=3,
        survived=3,
        seen="refused, unless NQF_PRIVATE_REDIRECTS allows it",
    )


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil"])
def test_unsafe_paths_are_refused(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "x.zip", {"good": b"1", name: b"2"})
    with pytest.raises(DataError, match="unsafe path"):
        unpack(path, ["good"], tmp_path)
    assert not (tmp_path / "good").exists()


def test_bombs_damage_and_absence(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.zip", {"in/zeros": bytes(5_000_000), "in/data": b"123"})
    with pytest.raises(DataError, match="'in/zeros' is larger than 1,000 bytes"):
        unpack(path, ["in/zeros"], tmp_path, limit=1000)
    with pytest.raises(DataError, match="there is no 'in/other' in it"):
        unpack(path, ["in/other"], tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.zip"]
    unpack(path, ["in/data"], tmp_path)
    assert (tmp_path / "data").read_bytes() == b"123"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"damaged: .*; delete it and fetch again"):
        unpack(path, ["in/data"], tmp_path)


def movielens_100k() -> bytes:
    genres = ["unknown", "Action", "Animation", "Drama"]
    flags = ["0|1|0|1", "1|0|0|0", "0|0|1|0", "0|1|1|0", "0|0|0|1"]
    items = "".join(f"{n}|Filmé {n} (199{n})|01-Jan-199{n}||http://x/|{flag}\n" for n, flag in enumerate(flags, 1))
    events = "".join(
        f"{u}\t{1 + (u + s) % 5}\t{1 + s}\t{880_000_000 + 100 * s}\n" for u in range(1, 9) for s in range(4)
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("ml-100k/u.item", items.encode("latin-1"))
        file.writestr("ml-100k/u.data", events)
        file.writestr("ml-100k/u.genre", "".join(f"{name}|{n}\n" for n, name in enumerate(genres)) + "\n")
        file.writestr("ml-100k/README", "terms")
    return buffer.getvalue()


def movielens_1m() -> bytes:
    items = "".join(f"{n}::Filmé {n} (200{n})::Action|Drama\n" for n in range(1, 6))
    events = "".join(f"{u}::{1 + (u + s) % 5}::{1 + s}::{960_000_000 + 9 * s}\n" for u in range(1, 9) for s in range(4))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("ml-1m/movies.dat", items.encode("latin-1"))
        file.writestr("ml-1m/ratings.dat", events)
        file.writestr("ml-1m/README", "terms")
    return buffer.getvalue()


def goodbooks(covers: str = "http://covers.test") -> dict[str, bytes]:
    def table(rows: list[list]) -> bytes:
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        return text.getvalue().encode()

    header = (
        "book_id,goodreads_book_id,authors,original_publication_year,title,language_code,average_rating,ratings_count,"
        "image_url"
    )
    books = [
        [n, 100 + n, "A. Author, B. Author", 1990.0 + n, f"Book, {n}", "eng", 4.1, 500 * n, f"{covers}/{n}.jpg"]
        for n in range(1, 6)
    ]
    # A book without a year and one without a language, as in the real file.
    books[0][3], books[1][5] = None, None
    tags = [["tag_id", "tag_name"], [1, "to-read"], [2, "fantasy"], [3, "my-books"], [4, "romance"]]
    counts = [["goodreads_book_id", "tag_id", "count"]]
    counts += [[100 + n, tag, 10 * tag + n] for n in range(1, 5) for tag in (1, 2, 3, 4)]
    events = [["user_id", "book_id", "rating"]] + [[u, 1 + (u + s) % 5, 4] for u in range(1, 9) for s in range(4)]
    return {
        "/books.csv": table([header.split(","), *books]),
        "/tags.csv": table(tags),
        "/book_tags.csv": table(counts),
        "/ratings.csv": table(events),
    }


def beauty() -> dict[str, bytes]:
    events = [
        {"reviewerID": f"A{u}", "asin": f"B{(u + s) % 5}", "reviewText": "good", "overall": 5.0, "helpful": [0, 1],
         "unixReviewTime": 1_400_000_000 + 86_400 * s}
        for u in range(8)
        for s in range(4)
    ]  # fmt: skip
    items = [
        {"asin": f"B{n}", "title": f"It's \"soap\" {n}", "price": 1.5 * n, "salesRank": {"Beauty": 10 + n},
         "imUrl": f"http://pictures.test/{n}.jpg", "brand": "X", "categories": [["Beauty", "Skin Care"], ["Gifts"]]}
        for n in range(5)
    ]  # fmt: skip
    # One that nobody bought, and one of which little is known.
    items += [{"asin": "B9", "title": "unsold"}]
    items[4] = {"asin": "B4", "categories": [["Beauty"]]}
    reviews = "".join(json.dumps(event) + "\n" for event in events)
    return {
        "/reviews_Beauty_5.json.gz": gzip.compress(reviews.encode()),
        # As the publisher writes them, dictionaries of Python.
        "/meta_Beauty.json.gz": gzip.compress("".join(f"{item}\n" for item in items).encode()),
    }


def amazon() -> dict[str, bytes]:
    meta = [
        {"parent_asin": f"B{n}", "title": f"Thing {n}", "price": n, "details": {"Brand": "X"}, "images": [],
         "store": "S", "average_rating": 4.0, "main_category": "All Beauty", "description": ["a", "b"]}
        for n in range(5)
    ]  # fmt: skip
    events = [
        {
            "user_id": f"U{u}",
            "parent_asin": f"B{(u + s) % 5}",
            "rating": 5.0,
            "timestamp": 1_600_000_000_000 + s,
            "text": "ok",
        }
        for u in range(8)
        for s in range(4)
    ]
    packed = [gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()) for rows in (meta, events)]
    names = "/meta_categories/meta_Gift_Cards.jsonl.gz", "/review_categories/Gift_Cards.jsonl.gz"
    return dict(zip(names, packed, strict=True))


@pytest.mark.parametrize(
    ("name", "files", "citation"),
    [
        ("ml-100k", {"/ml-100k.zip": movielens_100k()}, "Harper, Konstan"),
        ("ml-1m", {"/ml-1m.zip": movielens_1m()}, "no redistribution without permission"),
        ("goodbooks", goodbooks(), "Creative Commons Attribution-ShareAlike 4.0"),
        ("amazon-beauty", beauty(), "The publisher states no license"),
        ("amazon-2023:Gift_Cards", amazon(), "The publishers state no license"),
    ],
)
def test_every_set_is_ready_to_train(
    publisher: Publisher, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, name: str, files: dict, citation: str
) -> None:
    """From the publisher's files over the command to what the fields stage reads."""
    publisher.files |= files
    monkeypatch.chdir(tmp_path)
    command.main(["fetch", name, "--base-url", publisher.base + "/"])
    out = capsys.readouterr().out
    folder = tmp_path / "data" / name.replace(":", "-")
    assert citation in " ".join(out.split())
    assert citation in " ".join((folder / "LICENSE.txt").read_text().split())
    assert f"python -m nqf.train --config data/{folder.name}/config.yaml" in out
    assert not list(folder.rglob("*.tmp")) + list(folder.rglob("*.part"))
    config = load_config(folder / "config.yaml")
    assert config.name == folder.name
    dataset = prepare(config.data, tmp_path / "prepared")
    assert len(dataset.catalogue) == 5
    assert len(dataset.interactions.user_ids) == 8
    assert len(dataset.interactions.items) == 32
    assert not dataset.report["items"]["bad_values"]
    items = pl.read_parquet(tmp_path / "prepared" / "items.parquet").sort("item_id")
    if name == "ml-100k":
        assert items["title"][0] == "Filmé 1 (1991)"
        assert items["categories"].to_list() == [
            ["Action", "Drama"],
            None,
            ["Animation"],
            ["Action", "Animation"],
            ["Drama"],
        ]
        assert items["year"].to_list() == [1991, 1992, 1993, 1994, 1995]
    elif name == "ml-1m":
        assert items["categories"].to_list() == [["Action", "Drama"]] * 5
        assert dataset.interactions.times[0] == 960_000_000
    elif name == "goodbooks":
        assert items["brand"][0].to_list() == ["A. Author", "B. Author"]
        assert items["categories"].to_list() == [["romance", "fantasy"]] * 4 + [None]
        assert items["year"].to_list() == [None, 1992, 1993, 1994, 1995]
        assert dataset.report["fields_left_out"] == ["average_rating", "rating_number"]
    elif name == "amazon-beauty":
        assert items["title"].to_list() == [*(f'It\'s "soap" {n}' for n in range(4)), None]
        assert items["categories"].to_list() == [["Beauty", "Skin Care"]] * 4 + [["Beauty"]]
        assert items["price"].to_list() == [0, 1.5, 3, 4.5, None]
        assert dataset.interactions.times[1] == 1_400_086_400
        assert dataset.report["fields_left_out"] == ["sales_rank"]
    else:
        assert items["brand"].to_list() == [["X"]] * 5
        assert dataset.interactions.times[0] == 1_600_000_000
    if ":" not in name:
        # The shipped recipe, by its name, finds the same tables and reads the same of them.
        shipped = load_config(configuration(name))
        assert dataclasses.replace(shipped, data=config.data) == config
        assert Path(shipped.data.items) == folder / "items.parquet"
        prepare(shipped.data, tmp_path / "shipped")
        assert (tmp_path / "shipped" / "items.parquet").read_bytes() == (
            tmp_path / "prepared" / "items.parquet"
        ).read_bytes()
    # Again: nothing is downloaded a second time, and the tables are made again.
    requests = len(publisher.seen)
    fetch(name, folder, base=publisher.base)
    assert len(publisher.seen) == requests


def test_pictures_are_a_field(publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that can be had and read; a second call asks for the others alone."""
    publisher.files |= goodbooks(covers=publisher.base)
    for number in (1, 2, 3):
        content = io.BytesIO()
        Image.new("RGB", (98, 147), (40 * number, 10, 10)).save(content, "JPEG")
        publisher.files[f"/{number}.jpg"] = content.getvalue()
    publisher.files["/4.jpg"] = b"<html>gone</html>"
    monkeypatch.chdir(tmp_path)
    command.main(["fetch", "goodbooks", "--base-url", publisher.base])
    assert "image" not in Path("data/goodbooks/schema.yaml").read_text()
    with pytest.raises(DataError, match="links to none; there are some with goodbooks and amazon-beauty"):
        publisher.files["/ml-100k.zip"] = movielens_100k()
        command.main(["fetch", "ml-100k", "--pictures", "--base-url", publisher.base])
    for _ in range(2):
        publisher.seen.clear()
        command.main(["fetch", "goodbooks", "--pictures", "--base-url", publisher.base])
    asked = {str(request) for request in publisher.seen}
    assert any("/5.jpg" in request for request in asked) and not any("/1.jpg" in request for request in asked)
    prepare(load_config("data/goodbooks/config.yaml").data, tmp_path / "prepared")
    paths = pl.read_parquet("prepared/items.parquet").sort("item_id")["image"].to_list()
    assert [path is not None for path in paths] == [True, True, True, False, False]
    assert all(Image.open(path).size == (98, 147) for path in paths[:3])
    # What somebody wrote stays.
    Path("data/goodbooks/schema.yaml").write_text("title: title\nfields: {title: text}\n")
    command.main(["fetch", "goodbooks", "--pictures", "--base-url", publisher.base])
    assert "image" not in Path("data/goodbooks/schema.yaml").read_text()


def test_nothing_of_the_users_is_touched(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files["/ml-100k.zip"] = movielens_100k()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "items.parquet").write_text("mine")
    with pytest.raises(DataError, match=r"mine: holds files that were not fetched; give another --output"):
        fetch("ml-100k", mine, base=publisher.base)
    assert [path.name for path in mine.iterdir()] == ["items.parquet"] and not publisher.seen
    folder = tmp_path / "ml"
    fetch("ml-100k", folder, base=publisher.base)
    kept = {"notes.tmp": "mine", "u.data": "mine", "schema.yaml": "title: title\nfields: {title: text}\n"}
    for name, text in kept.items():
        (folder / name).write_text(text)
    fetch("ml-100k", folder, base=publisher.base)
    assert {name: (folder / name).read_text() for name in kept} == kept


def test_addresses_are_the_publishers() -> None:
    assert source_of("ml-1m").base + source_of("ml-1m").files[0] == (
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
    )
    beauty = source_of("amazon-2023:All_Beauty")
    assert [beauty.base + file for file in beauty.files] == [
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/meta_categories/meta_All_Beauty.jsonl.gz",
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/review_categories/All_Beauty.jsonl.gz",
    ]
    assert len(AMAZON_CATEGORIES) == 34


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ml-10k", "unknown data set 'ml-10k'; did you mean 'ml-100k'?"),
        ("amazon-2023:All_Beuty", "unknown category 'All_Beuty' of amazon-2023; did you mean 'All_Beauty'?"),
        ("amazon-2023", "unknown category '' of amazon-2023; known: All_Beauty"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(DataError) as error, contextlib.suppress(FileNotFoundError):
        source_of(name)
    assert message in str(error.value)
