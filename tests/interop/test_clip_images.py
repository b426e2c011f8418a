"""Images by URL and path: retries, bounds, the cache, and failures that are reported as missing."""

import http.server
import struct
import threading
import time
import urllib.error
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from nqf.interop.clip import Preprocessing
from nqf.interop.images import ImageReader
from nqf.net import RefusedError


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def server(picture):
    requests = Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests[self.path] += 1
            data = picture.read_bytes()
            if self.path == "/gone":
                return self.send_error(404)
            if self.path == "/busy" and requests[self.path] < 3:
                return self.send_error(503)
            if self.path == "/slow":
                time.sleep(1)
            if self.path == "/text":
                data = b"<html>no image</html>"
            if self.path == "/huge":
                data = bytes(5_000)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                return self.end_headers()
            if self.path in ("/endless", "/drip", "/halved"):
                self.send_response(200)
                self.end_headers()
                size = 1 if self.path == "/drip" else 1_000
                body = data * 1_000 if self.path == "/endless" else data
                if self.path == "/halved" and requests[self.path] == 1:
                    body = body[: len(body) // 2]
                for start in range(0, len(body), size):
                    self.wfile.write(body[start : start + size])
                    time.sleep(0.1 if self.path == "/drip" else 0)
                return None
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) + (self.path == "/cut")))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        # A client that gives up, as it should, is not news.
        running.handle_error = lambda *arguments: None
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", requests
        running.shutdown()


def reader(tmp_path, **options) -> ImageReader:
    return ImageReader(cache=tmp_path / "cache", pause=0.01, timeout=0.3, **{"max_bytes": 4_000, **options})


def read(reader, values):
    return dict(reader.read(values, lambda image: np.asarray(image.convert("RGB"))))


def test_urls_and_paths_give_the_same_pixels_in_order(server, picture, tmp_path) -> None:
    url, requests = server
    values = [f"{url}/b", str(picture), f"{url}/a"]
    found = read(reader(tmp_path), values)
    assert list(found) == values
    for pixels in found.values():
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(picture)))
    read(reader(tmp_path), values)
    assert requests == {"/a": 1, "/b": 1}, "a cached file was downloaded again"


def test_passing_failures_are_tried_again_and_final_ones_not(server, tmp_path) -> None:
    url, requests = server
    found = read(reader(tmp_path), [f"{url}/busy", f"{url}/gone"])
    assert isinstance(found[f"{url}/busy"], np.ndarray) and requests["/busy"] == 3
    assert "404" in str(found[f"{url}/gone"]) and requests["/gone"] == 1


def test_failures_are_reported_and_leave_nothing_in_the_cache(server, tmp_path) -> None:
    url, requests = server
    values = [f"{url}/slow", f"{url}/huge", f"{url}/cut", "http://127.0.0.1:1/", str(tmp_path / "none.png"), ""]
    found = read(reader(tmp_path, attempts=2), values)
    assert all(isinstance(reason, Exception) for reason in found.values())
    assert requests["/slow"] == 2 and requests["/cut"] == 2 and requests["/huge"] == 1
    assert "4000 bytes" in str(found[f"{url}/huge"]) and "none.png" in str(found[values[4]])
    assert not list((tmp_path / "cache").iterdir())


def test_what_is_no_image_is_reported(server, tmp_path) -> None:
    url, _ = server
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    found = read(reader(tmp_path), [str(tmp_path / "broken.png"), f"{url}/text"])
    assert all(isinstance(reason, Exception) for reason in found.values())


def test_downloads_run_at_the_same_time(picture, tmp_path, monkeypatch) -> None:
    # Each waits for the other: one after the other they would never finish.
    barrier = threading.Barrier(4)

    def download(self, url, path):
        barrier.wait(timeout=20)
        return picture

    monkeypatch.setattr(ImageReader, "_download", download)
    found = read(reader(tmp_path, threads=4), [f"http://x/{i}" for i in range(4)])
    assert all(isinstance(pixels, np.ndarray) for pixels in found.values())


def test_an_image_that_was_cut_is_fetched_again(server, picture, tmp_path) -> None:
    url, requests = server
    # A body without a length, which ends early; nothing but the decoder notices.
    found = read(reader(tmp_path), [f"{url}/halved"])
    np.testing.assert_array_equal(found[f"{url}/halved"], np.asarray(Image.open(picture)))
    assert requests["/halved"] == 2
    # What an earlier version left in the cache.
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:500])
    found = read(reader(tmp_path), [f"{url}/halved"])
    assert isinstance(found[f"{url}/halved"], np.ndarray) and requests["/halved"] == 3
    assert isinstance(read(reader(tmp_path), [f"{url}/text"])[f"{url}/text"], Exception)
    assert list((tmp_path / "cache").iterdir()) == [cached]


def test_bodies_without_a_length_are_bounded(server, tmp_path, record: Callable[..., None]) -> None:
    url, _ = server
    found = read(reader(tmp_path, attempts=1, longest=0.5), [f"{url}/endless", f"{url}/drip"])
    assert "4000 bytes" in str(found[f"{url}/endless"]) and "not complete after 0.5 s" in str(found[f"{url}/drip"])
    assert not list((tmp_path / "cache").iterdir())
    record(
        "pictures without a length, endless or a drop at a time",
        tried=2,
        survived=2,
        seen="refused with the bytes or seconds that were the most",
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]", "127.1"])
def test_redirects_to_this_machine_are_refused(
    host, server, tmp_path, monkeypatch, record: Callable[..., None]
) -> None:
    url, requests = server
    link = f"{url}/to/http://{host}:{url.rsplit(':', 1)[1]}/secret"
    reason = read(reader(tmp_path), [link])[link]
    assert "not a public address" in str(reason) and "NQF_PRIVATE_REDIRECTS" in str(reason)
    assert not requests["/secret"] and requests[link.removeprefix(url)] == 1, "asked again, or asked at all"
    if host == "127.0.0.1":
        monkeypatch.setenv("NQF_PRIVATE_REDIRECTS", "allow")
        assert isinstance(read(reader(tmp_path), [link])[link], np.ndarray)
    record(
        "the link of a picture that is redirected to this machine, in any spelling",
        tried=1,
        survived=1,
        seen="refused, unless NQF_PRIVATE_REDIRECTS allows it",
    )


@pytest.mark.parametrize(
    "target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "http://10.0.0.1/", "http://[fe80::1]/"]
)
def test_other_redirects_are_refused(target, server, tmp_path, record: Callable[..., None]) -> None:
    link = f"{server[0]}/to/{target}"
    # A scheme that urllib itself does not follow is the server's answer.
    assert isinstance(read(reader(tmp_path), [link])[link], RefusedError | urllib.error.HTTPError)
    record(
        "the link of a picture that is redirected to a file, another protocol or a private network",
        tried=1,
        survived=1,
        seen="refused",
    )


def test_bombs_are_refused_before_they_are_decoded(tmp_path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1_000_000))) + chunk(b"IEND", b"")
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    (tmp_path / "large.gif").write_bytes(b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"\x3b")
    (tmp_path / "large.bmp").write_bytes(
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    (tmp_path / "deep.tif").write_bytes(b"II*\x00" + struct.pack("<I", 8) + b"\xff" * 64)
    values = [str(path) for path in sorted(tmp_path.glob("*.*"))]
    assert len(values) == 4
    for value, reason in reader(tmp_path, max_bytes=1 << 30).read(values, Preprocessing()):
        assert isinstance(reason, Exception), value
