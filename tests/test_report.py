"""The report of a real run, read by a parser and opened in a real browser."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nqf import cli
from nqf.config import load_config, save_config
from nqf.report import main
from nqf.stages.folder import claim
from nqf.stages.records import StageError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=10000 --dump-dom"
).split()


def needs_browser(test: Callable) -> Callable:
    """Skips where there is none; slow, as a page is the same whatever Python wrote it."""
    reason = "no Chromium is installed; .ci/run installs Debian's"
    return pytest.mark.slow(pytest.mark.skipif(BROWSER is None, reason=reason)(test))


class Links(HTMLParser):
    """Collects what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "img"
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]


@pytest.fixture(scope="module")
def page(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "new" / "page.html"
    main([str(tiny_run), "--output", str(output), "--users", "4"])
    return output


def browse(page: Path, tmp_path: Path, *flags: str) -> str:
    """The document after its scripts have run."""
    done = subprocess.run(
        [BROWSER, *FLAGS, *flags, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert "data-check=" in done.stdout, done.stderr[-2000:]
    return done.stdout


def act(page: Path, script: str, tmp_path: Path, *, width: int = 1280, dark: bool = False, style: str = "") -> dict:
    """What a script finds in the page, in a frame of some width: no window is as narrow as a phone.

    The script's last value is handed back as JSON. It may wait; the page's own policy would not let it run.
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    (tmp_path / "inner.html").write_text(
        text.replace("</head>", f"<style>{style}</style></head>").replace(
            "</body>",
            "<script>addEventListener('load', async () => { const found = await (async () => {" + script + "})();"
            "parent.postMessage(JSON.stringify({...found, check: document.documentElement.dataset.check}), '*'); "
            "});</script></body>",
        ),
        encoding="utf-8",
    )
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"<!doctype html><iframe src='inner.html' style='width: {width}px; height: 800px; border: 0'></iframe><script>"
        "addEventListener('message', event => { document.documentElement.dataset.found = event.data; "
        "document.documentElement.dataset.check = 'ok'; });</script>",
        encoding="utf-8",
    )
    document = browse(outer, tmp_path, "--window-size=1400,900", f"--blink-settings=preferredColorScheme={1 - dark}")
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', document)[1]))
    assert found["check"] == "ok"
    return found


def check_of(document: str) -> str:
    return re.search(r'data-check="([^"]*)"', document)[1]


def test_the_page_stands_alone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = Links()
    found.feed(text)
    outside = [link for link in found.links if not link.startswith(("data:image/png;base64,", "#"))]
    assert not outside and found.pictures > 20
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", text)
    # Names of XML formats are no addresses that are loaded.
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    for heading in (
        "Results", "Where it works", "The catalogue on a plane", "Users", "What the Item Q-Former keeps", "Training",
        "How it was made",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text
    assert text.count('<div class="user">') == 4
    assert list(page.parent.iterdir()) == [page]


@needs_browser
def test_a_browser_finds_no_fault(page: Path, tmp_path: Path) -> None:
    document = browse(page, tmp_path)
    assert check_of(document) == "ok"
    # The map was drawn: its legend is made by the script.
    legend = re.search(r'<div class="legend">(.*?)</div>', document)[1]
    assert legend.count("<span>") >= 2


@needs_browser
def test_the_table_sorts_and_the_map_changes(page: Path, tmp_path: Path) -> None:
    seen = act(
        page,
        """
        const table = document.querySelector('table.results'), head = table.querySelector('th.key');
        const rows = () => [...table.tBodies[0].rows], button = head.querySelector('button');
        const values = () => rows().map(row => +row.cells[1].dataset.value);
        const states = [head.getAttribute('aria-sort')], sorted = [];
        for (let press = 0; press < 2; press++) {
          button.click();
          sorted.push(values());
          states.push(head.getAttribute('aria-sort'));
        }
        const marked = table.querySelectorAll('[aria-sort]:not([aria-sort=none])').length;
        const color = document.querySelectorAll('.map select')[1];
        color.value = 'popularity';
        color.dispatchEvent(new Event('change'));
        const canvas = document.querySelector('canvas');
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        const points = document.querySelector('.points');
        points.open = true;
        await new Promise(resolve => setTimeout(resolve, 100));
        const titles = () => [...points.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent);
        points.querySelector('th.key button').click();
        const tip = document.querySelector('.tip'), tips = {};
        for (const kind of ['mouse', 'touch']) {
          // The nearest point is within reach of somewhere on a fine grid.
          for (let at = 0; at < 4000 && !tips[kind]; at++) {
            const box = canvas.getBoundingClientRect(), x = (at % 80) / 80 * box.width, y = Math.floor(at / 80) * 10;
            canvas.dispatchEvent(new PointerEvent(kind == 'touch' ? 'pointerdown' : 'pointermove',
              {pointerType: kind, clientX: box.left + x, clientY: box.top + y}));
            if (tip.style.display == 'block') tips[kind] = tip.textContent;
          }
        }
        return {sorted, states, marked, names: rows().map(row => row.cells[0].textContent), ink: pixels.some(Boolean),
          legend: document.querySelector('.legend').textContent, titles: titles(), tips,
          label: canvas.getAttribute('aria-label'), focusable: button.tabIndex};
        """,
        tmp_path,
    )
    down, up = seen["sorted"]
    assert down == sorted(down, reverse=True) and up == sorted(up)
    assert seen["states"] == ["none", "descending", "ascending"] and seen["marked"] == 1 and seen["focusable"] == 0
    # What counts beside the vectors, or in them, and so has rows of its own, is chosen on validation.
    chosen = {"joint_vectors", "joint_learned", "sasrec_cooccurrence"}
    assert set(seen["names"]) - chosen == {
        "joint", "user", "popular", "recent_popular", "last_item_cosine", "cooccurrence", "cooccurrence_text", "sasrec",
    }  # fmt: skip
    assert seen["ink"] and "no training interaction" in seen["legend"] and "table" in seen["label"]
    assert len(seen["titles"]) == 240 and seen["titles"][0] < seen["titles"][-1]
    assert all("training interactions" in seen["tips"][kind] for kind in ("mouse", "touch"))


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, which is a tool of the tests alone."""
    if shutil.which("npm") is None:
        pytest.skip("axe-core checks accessibility, and there is no npm to install it")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", "axe-core@4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"axe-core checks accessibility and could not be installed: {done.stderr[-300:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


AXE = """
    for (const details of document.querySelectorAll('details')) details.open = true;
    await new Promise(resolve => setTimeout(resolve, 100));
    const result = await axe.run(document);
    return {dark: matchMedia('(prefers-color-scheme: dark)').matches, passes: result.passes.length,
      wrong: result.violations.map(rule => [rule.id, rule.nodes.length, rule.nodes[0].html, rule.help])};
"""


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing(page: Path, tmp_path: Path, axe: str, width: int, dark: bool) -> None:
    found = act(page, axe + AXE, tmp_path, width=width, dark=dark)
    assert found["dark"] is dark and found["passes"] > 20
    assert not found["wrong"]


@needs_browser
def test_axe_would_find_weak_contrast(page: Path, tmp_path: Path, axe: str) -> None:
    found = act(page, axe + AXE, tmp_path, style=".note {color: #16a34a !important}")
    assert [rule[0] for rule in found["wrong"]] == ["color-contrast"]


@needs_browser
def test_letters_of_the_charts_can_be_read_on_a_phone(page: Path, tmp_path: Path) -> None:
    measure = """
        const shown = [...document.querySelectorAll('svg')].filter(svg => svg.clientWidth);
        const sizes = shown.flatMap(svg => [...svg.querySelectorAll('text')].map(
          text => parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a));
        return {charts: shown.length, smallest: Math.min(...sizes), largest: Math.max(...sizes),
          wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
          cut: shown.filter(svg => [...svg.querySelectorAll('text')].some(text => {
            const box = text.getBoundingClientRect(), edge = svg.getBoundingClientRect();
            return box.left < edge.left - 2 || box.right > edge.right + 2; })).map(svg => svg.ariaLabel)};
    """
    for width in (390, 1280):
        found = act(page, measure, tmp_path, width=width)
        assert found["charts"] == 5 and found["wide"] == 0
        assert 10 < found["smallest"] and found["largest"] < 20
        assert not found["cut"], found["cut"]


@needs_browser
def test_no_table_is_cut_on_paper(page: Path, tmp_path: Path) -> None:
    """A4 with margins of 1 cm has 718 CSS pixels; what is for print alone is applied to the screen."""
    text = page.read_text(encoding="utf-8")
    assert "@media print {" in text
    paper = tmp_path / "paper.html"
    paper.write_text(text.replace("@page {size: A4; margin: 1cm}", "").replace("@media print {", "@media all {"))
    found = act(
        paper,
        """
        const tables = [...document.querySelectorAll('table')].filter(table => table.clientWidth);
        return {count: tables.length, wide: document.documentElement.scrollWidth, cut: tables.filter(table =>
          table.scrollWidth > table.parentElement.clientWidth || table.getBoundingClientRect().right > innerWidth
          || getComputedStyle(table.parentElement).overflowX == 'auto').length};
        """,
        tmp_path,
        width=718,
    )
    assert found["count"] == 3 and found["cut"] == 0 and found["wide"] <= 718
    pdf = tmp_path / "page.pdf"
    flags = [flag for flag in FLAGS if flag != "--dump-dom"]
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={pdf}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=180, check=True)
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF") and re.search(rb"/MediaBox \[0 0 59[45]\S* 84[12]", content)


@needs_browser
@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('src="data:image/png;base64,', 'src="data:image/png;base64,AAAA', "picture"),
        ("</body>", "<script>nothing.here()</script></body>", "ok"),
        ("</body>", '<img src="https://example.org/x.png" alt="far"></body>', "picture far"),
    ],
)
def test_the_check_can_fail(page: Path, tmp_path: Path, old: str, new: str, fault: str) -> None:
    broken = tmp_path / "broken.html"
    text = page.read_text(encoding="utf-8")
    broken.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert fault in check_of(browse(broken, tmp_path))
    # A script that is not the page's own does not run; without the policy its error is seen.
    if "nothing" in new:
        broken.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace(old, new, 1), encoding="utf-8")
        assert "nothing is not defined" in check_of(browse(broken, tmp_path))


def test_a_stale_model_is_left_out(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    config = load_config(run / "config.yaml")
    save_config(config.__class__(**{**vars(config), "seed": 5}), run / "config.yaml")
    main([str(run)])
    shown = capsys.readouterr().out
    assert "no sample users: stage 'joint' has changed since: " in shown and "wrote" in shown
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<h2>Users</h2>" not in text and "<h2>The catalogue on a plane</h2>" in text


def test_what_is_missing_is_named(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "eval"))
    with pytest.raises(SystemExit):
        cli.guard(main, [str(run)])
    assert "run python -m nqf.evaluate" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.guard(main, [str(run)])
    assert "pip install 'nqf[viz]'" in capsys.readouterr().err


def copy_of(run: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    claim(copy, "report.html")
    (copy / "report.html").write_text("the old page")
    return copy


REPORT = "import os, resource, signal, sys; from nqf.cli import guard; from nqf.report import main\n"


@pytest.mark.ci
def test_a_kill_leaves_the_old_page(tiny_run: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    """At the worst moment: the new page is written and not yet in its place."""
    run = copy_of(tiny_run, tmp_path)
    code = REPORT + "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\nguard(main, sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, str(run), "--users", "0"], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert (run / "report.html").read_text() == "the old page"
    main([str(run), "--users", "0"])
    assert "<h1>tiny</h1>" in (run / "report.html").read_text()
    assert not list(run.glob(".report*"))
    record(
        "SIGKILL when a report is written and not yet in its place",
        tried=1,
        survived=1,
        seen="nothing: the old page stays, and the next report is whole",
    )


def test_a_full_disk_is_one_paragraph(tiny_run: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    run = copy_of(tiny_run, tmp_path)
    code = REPORT + "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\nguard(main, sys.argv[1:])"
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", code, str(run), "--users", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-2:] == [
        f"error: [Errno 27] File too large: nothing was written: '{run / 'report.html'}'",
        "(--debug shows the traceback)",
    ]
    assert (run / "report.html").read_text() == "the old page"
    assert not [path for path in run.iterdir() if path.name.startswith(".report")]
    record(
        "a disk that is full when a report is written",
        tried=1,
        survived=1,
        seen="an error of one paragraph with the file; the old page stays",
    )


def test_results_of_the_validation_cases_are_no_report(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path)
    path = run / "eval" / "results.json"
    tree = json.loads(path.read_text()) | {"split": "valid"}
    # As version 0.2 wrote it, which did not bind it to its table.
    del tree["digest"]
    path.write_text(json.dumps(tree))
    with pytest.raises(FileNotFoundError, match=r"results of the valid split, .*run python -m nqf.evaluate"):
        main([str(run)])


def test_a_page_of_the_users_own_stays(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    (run / "report.html").write_text("mine")
    with pytest.raises(StageError, match=r"report.html: not made by nqf; move it away"):
        main([str(run), "--users", "0"])
    assert (run / "report.html").read_text() == "mine"
