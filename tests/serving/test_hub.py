"""A run goes to the Hub and comes back, by a server that stands in for it."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
COMMIT = "c0ffee" * 6 + "c0ff"


class StandIn(BaseHTTPRequestHandler):
    """As much of the Hub's interface as an upload and a download of small files need."""

    files: dict[str, bytes]
    made: list[dict]

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, tree: object, status: int = 200) -> None:
        self.content(json.dumps(tree).encode(), status, {"Content-Type": "application/json"})

    def content(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/shop", "name": "me/shop"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                record = json.loads(line)
                if record["key"] == "file":
                    self.files[record["value"]["path"]] = base64.b64decode(record["value"]["content"])
            self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/shop/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "commitMessage": "",
                }
            )
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if re.fullmatch("/api/models/me/shop(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": "me/shop", "sha": COMMIT, "siblings": siblings, "private": True, "tags": []})
        elif path.startswith("/api/models/me/shop/tree/"):
            self.answer([{"type": "file", "path": name, "size": len(body), "oid": "0" * 40}
                         for name, body in self.files.items()])  # fmt: skip
        elif (found := re.fullmatch("/me/shop/resolve/[^/]+/(.*)", path)) and found[1] in self.files:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hash(found[1]) & 0xFFFFFFFF:08x}"'}
            self.content(self.files[found[1]], 200, headers)
        else:
            self.content(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[tuple[str, type[StandIn]]]:
    handler = type("Handler", (StandIn,), {"files": {}, "made": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()


SCRIPT = """
import sys
import nqf
run, name = sys.argv[1:]
rec = nqf.Recommender.load(run)
rec.add_items([{"item_id": "new", "title": "Walnut desk"}])
print(rec.push_to_hub(name))
again = nqf.Recommender.load(name)
assert again.item_ids == rec.item_ids
for request in ({"history": ["new", rec.item_ids[0]]}, {"user": rec.user_ids[0]}):
    assert again.recommend(**request, k=50).equals(rec.recommend(**request, k=50))
try:
    nqf.Recommender.load("me/nothing")
except RuntimeError as error:
    print(error)
"""


def test_there_and_back(hub: tuple[str, type[StandIn]], tiny_run: Path, tmp_path: Path) -> None:
    address, handler = hub
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_stand_in",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-c", SCRIPT, str(tiny_run), "me/shop"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"/commit/{COMMIT}" in done.stdout
    assert "me/nothing: neither a run folder nor a repository" in done.stdout
    assert "private" in (handler.made[0].get("visibility"), *(["private"] * bool(handler.made[0].get("private"))))
    assert handler.files["README.md"].startswith(b"---\nlibrary_name: nqf\n")
    names = set(handler.files)
    assert {"config.yaml", "joint/stage.json", "items/items.json", "tokens/tokens.npy"} <= names
    assert not [name for name in names if name.startswith(("tensorboard", "eval", "sasrec", "data/source"))]
