"""Images by URL and path: retries, bounds, the cache, and failures that are reported as missing."""

import http.server
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from nqf.interop.images import ImageReader


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
