"""The service over HTTP: answers, refusals, batches, changes of the run, and the page in a real browser."""

import html
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from nqf import Recommender
from nqf.serving import app as web
from nqf.serving.app import make_app, openapi
from nqf.serving.service import Service

pytestmark = pytest.mark.slow
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed; .ci/run installs Debian's")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=60000 --dump-dom"
).split()


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("service") / "run"))


@pytest.fixture(scope="module")
def service(run: Path) -> Service:
    return Service(run)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service, watch=0.2), raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, path: str, method: str = "POST", **body: object) -> dict:
    answer = client.request(method, path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_answers_are_those_of_the_recommender(client: TestClient, service: Service) -> None:
    rec, ids = service.recommender, service.recommender.item_ids
    found = post(client, "/v1/recommend", history=ids[:3], k=5)["items"]
    expected = rec.recommend(history=ids[:3], k=5).to_dicts()
    assert [{key: item[key] for key in expected[0]} for item in found] == expected
    assert {"cold", "new"} <= found[0].keys()
    many = post(client, "/v1/recommend", histories=[ids[:3], []], k=2)["items"]
    assert [item["basis"] for item in many] == ["history", "history", "popular", "popular"]
    user = post(client, "/v1/recommend", user=rec.user_ids[0], k=3, where={"price": {"least": 5, "most": 60}})["items"]
    assert [item["item_id"] for item in user] == rec.recommend(user=rec.user_ids[0], k=3, where={"price": (5, 60)})[
        "item_id"
    ].to_list()
    near = post(client, "/v1/similar", item_id=ids[4], k=3, exclude=[ids[5]])["items"]
    assert [item["item_id"] for item in near] == rec.similar_items(ids[4], k=3, exclude=[ids[5]])["item_id"].to_list()
    why = post(client, "/v1/explain", history=ids[:3], item_id=ids[9])
    assert why["rank"] == rec.explain(ids[:3], ids[9]).rank and len(why["history"]) == 3
    title = rec.titles[7].split()[0]
    hits = post(client, "/v1/search", text=title.upper(), limit=100)
    assert hits["found"] == sum(title.casefold() in other.casefold() for other in rec.titles)
    looked = post(client, "/v1/lookup", item_ids=[ids[1], ids[0]])["items"]
    assert [item["item_id"] for item in looked] == [ids[1], ids[0]]
    assert client.get("/health").json()["items"] == 240


@pytest.mark.parametrize(
    ("status", "method", "path", "content", "message"),
    [
        (400, "POST", "/v1/recommend", {}, "give either a history or a user"),
        (404, "POST", "/v1/recommend", {"history": ["nothing"]}, "unknown item ids in the history: 'nothing'"),
        (404, "POST", "/v1/recommend", {"user": "nobody"}, "unknown user: 'nobody'"),
        (422, "POST", "/v1/recommend", {"history": "item-00001"}, "history: Input should be a valid array"),
        (422, "POST", "/v1/recommend", {"history": [1]}, "history.0: Input should be a valid string"),
        (422, "POST", "/v1/recommend", {"history": ["a"], "k": 10**9}, "k: Input should be less than or equal to 1000"),
        (422, "POST", "/v1/recommend", {"histroy": ["a"]}, "histroy: Extra inputs are not permitted"),
        (400, "POST", "/v1/recommend", {"history": ["item-00001"], "where": {"brnd": "x"}}, "did you mean 'brand'"),
        (422, "POST", "/v1/recommend", b"{", "Invalid JSON"),
        (422, "POST", "/v1/recommend", b'{"history": ["\\ud800"]}', "Invalid JSON"),
        (422, "POST", "/v1/recommend", b"[" * 100_000, "Invalid JSON"),
        (404, "GET", "/../../etc/passwd", None, "there is nothing here"),
        (405, "GET", "/v1/recommend", None, "not by this method"),
        (404, "GET", "/v1/picture?item_id=nothing", None, "unknown item ids"),
        (400, "POST", "/v1/items", {"items": [{"item_id": "x", "image": "/etc/passwd"}]}, "pictures of new items"),
        (400, "POST", "/v1/items", {"items": [{"item_id": "x", "titel": "a"}]}, "did you mean 'title'"),
        (400, "POST", "/v1/items", {"items": [{"item_id": "x", "price": "cheap"}]}, "price is not a number"),
        (400, "DELETE", "/v1/items", {"item_ids": ["nothing"]}, "not in the catalogue"),
    ],
)
def test_refusals_say_what_is_wrong(
    client: TestClient, run: Path, status: int, method: str, path: str, content: object, message: str
) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    answer = client.request(method, path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]
    assert str(run) not in answer.text and "Traceback" not in answer.text and "site-packages" not in answer.text


def test_what_goes_wrong_here_is_not_told(client: TestClient, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", str(run / "items"))

    monkeypatch.setattr(Recommender, "recommend", broken)
    answer = client.post("/v1/recommend", json={"history": ["item-00001"]})
    assert answer.status_code == 500 and answer.json() == {
        "error": "something went wrong here; the log of the service says what"
    }


def test_limits(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "LARGEST_BODY", 1_000)
    assert client.post("/v1/recommend", json={"history": ["x" * 2_000]}).status_code == 413
    # No page of another site can send JSON in the name of who looks at it.
    plain = client.post("/v1/recommend", content=b'{"history": []}', headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    monkeypatch.setattr("nqf.serving.service.WAITING", 0)
    busy = client.post("/v1/recommend", json={"history": []})
    assert busy.status_code == 503 and busy.headers["retry-after"] == "1"


def test_token_hosts_and_read_only(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with TestClient(make_app(service, token="secret", hosts=("testserver",))) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret2"}):
            answer = client.post("/v1/recommend", json={"history": []}, headers=headers)
            assert answer.status_code == 401 and "Bearer" in answer.headers["www-authenticate"]
        right = {"authorization": "Bearer secret"}
        assert client.post("/v1/recommend", json={"history": []}, headers=right).status_code == 200
        assert client.get("/metrics").status_code == 401 and client.get("/").status_code == 200
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
        monkeypatch.setattr(service, "writable", False)
        body = {"items": [{"item_id": "x", "title": "Desk"}]}
        assert client.post("/v1/items", json=body, headers=right).status_code == 403


def test_concurrent_requests_share_batches(client: TestClient, service: Service) -> None:
    ids, users = service.recommender.item_ids, service.recommender.user_ids
    bodies = [{"history": ids[start : start + 1 + start % 4], "k": 4} for start in range(60)]
    bodies += [{"user": users[0], "k": 4}] * 20 + [{"history": ["nothing"], "k": 4}] * 3 + [{"history": [], "k": 4}]
    alone = [client.post("/v1/recommend", json=body) for body in bodies]
    service.batches.clear()
    # The one thread that computes is held, so that the others have to wait together.
    gate = threading.Event()
    service._fast.submit(gate.wait)
    with ThreadPoolExecutor(len(bodies)) as pool:
        waiting = [pool.submit(client.post, "/v1/recommend", json=body) for body in bodies]
        while len(service._waiting) < len(bodies) - 2 * 64 and not all(future.running() for future in waiting):
            time.sleep(0.01)
        time.sleep(0.5)
        gate.set()
        together = [future.result() for future in waiting]
    assert sum(size * count for size, count in service.batches.items()) == len(bodies)
    assert max(service.batches) > 8
    for one, other in zip(alone, together, strict=True):
        assert one.status_code == other.status_code
        if one.status_code == 200:
            left, right = one.json()["items"], other.json()["items"]
            assert [item["item_id"] for item in left] == [item["item_id"] for item in right]
            assert [item["score"] for item in left] == pytest.approx([item["score"] for item in right], abs=2e-6)
        else:
            assert one.json() == other.json()


@pytest.mark.ci
def test_items_change_and_the_run_is_loaded_again(client: TestClient, service: Service, run: Path) -> None:
    ids = service.recommender.item_ids
    assert post(client, "/v1/items", items=[{"item_id": "new", "title": "Walnut desk", "price": 4.5}])["items"] == 241
    post(client, "/v1/items", method="PATCH", items=[{"item_id": "new", "price": 5}])
    item = post(client, "/v1/lookup", item_ids=["new"])["items"][0]
    assert item["values"]["price"] == 5 and item["new"] and item["cold"] and item["title"] == "Walnut desk"
    assert len(post(client, "/v1/recommend", history=["new"], only=["new", ids[3]], k=5)["items"]) == 1
    post(client, "/v1/items", method="DELETE", item_ids=[ids[3]])
    assert not post(client, "/v1/recommend", history=["new"], only=[ids[3]], k=5)["items"]
    before = service.recommender
    time.sleep(0.6)
    assert service.recommender is before, "its own changes are no reason to load the run again"
    # Another process changes the items; requests continue being answered meanwhile.
    Recommender.load(run).add_items([{"item_id": "other", "title": "Oak desk"}], save=True)
    deadline = time.monotonic() + 120
    while service.recommender is before and time.monotonic() < deadline:
        assert post(client, "/v1/recommend", history=["new"], k=3)["items"]
    assert {"new", "other"} <= set(service.recommender.item_ids) and not service.recommender.available[3]
    # What cannot be loaded changes nothing.
    now = service.recommender
    (run / "items" / "items.json").write_text("{")
    while not service.failed and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.get("/health").json()["reload_failed"] is True and service.recommender is now
    assert post(client, "/v1/recommend", history=["new"], k=3)["items"]
    shutil.rmtree(run / "items")


def test_metrics_and_openapi(client: TestClient) -> None:
    client.post("/v1/recommend", json={"history": []})
    client.post("/v1/recommend", json={})
    text = client.get("/metrics").text
    assert re.search(r'nqf_requests_total\{route="POST /v1/recommend",status="200"\} \d+', text)
    assert re.search(r'nqf_requests_total\{route="POST /v1/recommend",status="400"\} \d+', text)
    assert 'nqf_request_seconds_bucket{route="POST /v1/recommend",le="+Inf"}' in text
    assert client.get("/openapi.json").json() == json.loads(json.dumps(openapi()))
    described = openapi()
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(described)))
    assert references <= described["components"]["schemas"].keys()
    assert {"/v1/recommend", "/v1/items", "/health", "/metrics"} <= described["paths"].keys()


def test_pictures(client: TestClient, service: Service, tmp_path: Path) -> None:
    ids = service.recommender.item_ids
    for item in post(client, "/v1/lookup", item_ids=ids[:20])["items"]:
        answer = client.get("/v1/picture", params={"item_id": item["item_id"]})
        assert answer.status_code in ((200, 404) if item["picture"] else (404,))
        if answer.status_code == 200:
            assert answer.content[:2] == b"\xff\xd8" and answer.headers["content-type"] == "image/jpeg"


def test_the_command(tiny_run: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nqf.serve", str(tiny_run), "--port", str(port), "--read-only"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                    assert json.load(answer)["items"] == 240
                break
            except OSError:
                time.sleep(0.1)
        body, kind = json.dumps({"item_ids": ["item-00001"]}).encode(), {"Content-Type": "application/json"}
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(f"{address}/v1/items", body, kind, method="DELETE"))
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode in (0, 130) and "Traceback" not in err, err
    assert address in out


SCRIPTS: dict[str, str] = {}
OUTER = """<!doctype html><iframe src="/" style="width: {width}px; height: 900px; border: 0"></iframe><script>
const frame = document.querySelector("iframe"), pause = () => new Promise(done => setTimeout(done, 50));
addEventListener("load", async () => {{
  const page = frame.contentDocument, root = page.documentElement, at = id => page.getElementById(id);
  const until = async test => {{ for (let turn = 0; turn < 1000 && !test(); turn++) await pause(); return test(); }};
  const ids = list => [...at(list).children].map(card => card.dataset.id);
  const settled = async call => {{ root.dataset.check = ""; call(); await until(() => root.dataset.check); }};
  let found;
  try {{
    await until(() => root.dataset.check);
    found = await (async () => {{ {script} }})();
  }} catch (error) {{ found = {{ error: String(error) }}; }}
  document.documentElement.dataset.found = JSON.stringify({{ ...found, check: root.dataset.check }});
}});</script>"""


@pytest.fixture(scope="module")
def address(tiny_run: Path) -> Iterator[str]:
    """A real server, with pages beside its own that hold its page in a frame and act on it."""

    async def outer(request: Request) -> HTMLResponse:
        width, script = request.path_params["width"], SCRIPTS[request.path_params["name"]]
        return HTMLResponse(OUTER.format(width=width, script=script))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = make_app(Service(tiny_run, writable=False), hosts=("127.0.0.1",))
    made.router.routes.append(Route("/outer/{name}/{width:int}", outer))
    server = uvicorn.Server(uvicorn.Config(made, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def act(address: str, script: str, folder: Path, *, width: int = 1280, dark: bool = False) -> dict:
    """What a script finds in the page, in a frame of some width; its last value is handed back as JSON."""
    name = f"script-{len(SCRIPTS)}"
    SCRIPTS[name] = script
    flags = [*FLAGS, "--window-size=1400,1000", f"--blink-settings=preferredColorScheme={1 - dark}"]
    command = [BROWSER, *flags, f"--user-data-dir={folder / 'profile'}", f"{address}/outer/{name}/{width}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2_000:]
    result = json.loads(html.unescape(found[1]))
    assert result["check"] == "ok" and "error" not in result, result
    assert "Refused to" not in done.stderr and "Uncaught" not in done.stderr, done.stderr[-2_000:]
    return result


@needs_browser
def test_the_page_is_clicked_through(address: str, tiny_run: Path, tmp_path: Path) -> None:
    seen = act(
        address,
        """
        const first = ids("recommended"), basis = at("basis").textContent;
        at("text").value = "item-0000";
        at("search").requestSubmit();
        await until(() => at("count").textContent.includes("item-0000"));
        const hits = ids("found");
        for (const index of [0, 1, 2]) {
          await settled(() => at("found").children[index].querySelector("button").click());
        }
        const history = ids("history"), whole = ids("recommended");
        const images = () => [...page.querySelectorAll("#recommended img")];
        const pictures = await until(() => images().some(one => one.naturalWidth > 0));
        const why = at("recommended").children[0].querySelector("[aria-expanded]");
        why.click();
        const box = at("recommended").children[0].querySelector(".why");
        await until(() => box.querySelector("dl") || box.textContent.length > 3);
        const reasons = [...box.querySelectorAll("dt")].map(one => one.textContent);
        await settled(() => at("history").children[1].querySelector("button").click());
        const without = ids("recommended"), pressed = at("history").children[1].querySelector("button").ariaPressed;
        const moves = page.querySelectorAll("#recommended .up, #recommended .down").length, still = ids("history");
        await settled(() => at("history").children[1].querySelector("button").click());
        const again = ids("recommended");
        await settled(() => at("history").children[1].querySelectorAll("button")[1].click());
        return { first, basis, hits, history, whole, pictures, reasons, without, pressed, moves, still, again,
          removed: ids("recommended"), left: ids("history"), focus: page.activeElement.textContent };
        """,
        tmp_path,
    )
    rec = Recommender.load(tiny_run)

    def best(history: list[str]) -> list[str]:
        return rec.recommend(history=history, k=12)["item_id"].to_list()

    assert seen["first"] == best([]) and "popular" in seen["basis"]
    assert seen["hits"][:3] == seen["history"] == rec.item_ids[:3] and len(seen["hits"]) == 10
    assert seen["whole"] == seen["again"] == best(rec.item_ids[:3])
    less = [rec.item_ids[0], rec.item_ids[2]]
    assert seen["without"] == seen["removed"] == best(less) and seen["left"] == less
    assert seen["still"] == rec.item_ids[:3] and seen["pressed"] == "true" and seen["moves"] > 0
    assert seen["pictures"] and set(seen["reasons"]) & {*rec.titles[:3]} and set(seen["reasons"]) - {*rec.titles}
    assert seen["focus"] == "Without"


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_phone_keyboard_and_contrast(address: str, tmp_path: Path, dark: bool) -> None:
    seen = act(
        address,
        """
        const luminance = color => {
          const parts = color.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
            .map(part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
          return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2];
        };
        const ground = element => {
          for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (color !== "rgba(0, 0, 0, 0)" && color !== "transparent") return color;
          }
          return "rgb(255, 255, 255)";
        };
        const weak = [];
        for (const element of page.querySelectorAll("h1, h2, h3, p, label, button, a, .quiet, .badge, .up, .down")) {
          if (!element.textContent.trim() || !element.offsetWidth) continue;
          const pair = [luminance(getComputedStyle(element).color), luminance(ground(element))].sort((a, b) => b - a);
          if ((pair[0] + .05) / (pair[1] + .05) < 4.5) weak.push(element.outerHTML.slice(0, 80));
        }
        const unnamed = [...page.querySelectorAll("button, input")]
          .filter(one => !(one.ariaLabel || one.textContent.trim() || one.labels?.length)).length;
        page.dispatchEvent(new KeyboardEvent("keydown", { key: "/", bubbles: true }));
        const heights = [...page.querySelectorAll("button")].map(one => one.offsetHeight);
        const small = heights.filter(height => height && height < 32).length;
        return { wide: root.scrollWidth, weak, unnamed, small, focus: page.activeElement.id,
          ground: getComputedStyle(page.body).backgroundColor };
        """,
        tmp_path,
        width=390,
        dark=dark,
    )
    assert seen["wide"] <= 390 and not seen["weak"] and not seen["unnamed"] and not seen["small"]
    assert seen["focus"] == "text"
    assert (int(seen["ground"].split("(")[1].split(",")[0]) < 128) == dark


def test_titles_are_text_in_the_page() -> None:
    script = (Path(web.__file__).parent / "web" / "page.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
