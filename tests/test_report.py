"""The report of a real run, read by a parser and opened in a real browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nqf import cli
from nqf.config import load_config, save_config
from nqf.report import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed; .ci/run installs Debian's")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=10000 --dump-dom"
).split()


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


def browse(page: Path, tmp_path: Path) -> str:
    """The document after its scripts have run."""
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert "data-check=" in done.stdout, done.stderr[-2000:]
    return done.stdout


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
    act = """<script>addEventListener('load', () => {
      const rows = () => [...document.querySelectorAll('table.sortable tbody tr')];
      const names = () => rows().map(row => row.cells[0].textContent);
      const values = () => rows().map(row => +row.cells[1].dataset.value);
      document.querySelector('th.key').click();
      const down = values();
      document.querySelector('th.key').click();
      const up = values();
      const color = document.querySelectorAll('.map select')[1];
      color.value = 'popularity';
      color.dispatchEvent(new Event('change'));
      const canvas = document.querySelector('canvas');
      const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      canvas.dispatchEvent(new MouseEvent('mousemove', {bubbles: true}));
      document.documentElement.dataset.acted = JSON.stringify({down, up, names: names(), ink: pixels.some(Boolean),
        legend: document.querySelector('.legend').textContent});
    });</script></body>"""
    acted = tmp_path / "acted.html"
    acted.write_text(page.read_text(encoding="utf-8").replace("</body>", act), encoding="utf-8")
    document = browse(acted, tmp_path)
    assert check_of(document) == "ok"
    seen = json.loads(html.unescape(re.search(r'data-acted="([^"]*)"', document)[1]))
    assert seen["down"] == sorted(seen["down"], reverse=True) and seen["up"] == sorted(seen["up"])
    assert set(seen["names"]) == {
        "joint", "user", "popular", "recent_popular", "last_item_cosine", "cooccurrence", "sasrec",
    }  # fmt: skip
    assert seen["ink"] and "no training interaction" in seen["legend"]


@needs_browser
@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('src="data:image/png;base64,', 'src="data:image/png;base64,AAAA', "picture"),
        ("</body>", "<script>nothing.here()</script></body>", "nothing is not defined"),
        ("</body>", '<img src="https://example.org/x.png" alt="far"></body>', "picture far"),
    ],
)
def test_the_check_can_fail(page: Path, tmp_path: Path, old: str, new: str, fault: str) -> None:
    broken = tmp_path / "broken.html"
    # The faulty script has to stand before the page's own, which listens from then on.
    text = page.read_text(encoding="utf-8")
    broken.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert fault in check_of(browse(broken, tmp_path))


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
