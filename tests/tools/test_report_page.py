"""The report's page from hand-made results: what it says, and that nothing in the data breaks out of it."""

import base64
import dataclasses
import hashlib
import html
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from hand_made import random_interactions

from nqf.config import EvaluationConfig
from nqf.evaluation.baselines import cooccurrence, popular
from nqf.evaluation.cooccurrence import Counting
from nqf.evaluation.results import evaluate
from nqf.tools.report import page as page_module
from nqf.tools.report.cards import Card
from nqf.tools.report.figures import reconstruction_figure
from nqf.tools.report.page import Map, Report, User, render
from nqf.tools.templates import plain

NODE = shutil.which("node")
EVIL = '</script><script>alert(1)</script>\x1b[31m \u202e{{ 7 * 7 }} "><img src=x onerror=alert(1)>'


def make_report(**changes: object) -> Report:
    interactions, split = random_interactions(1)
    rng = np.random.default_rng(0)
    models = {
        "joint": (rng.normal(size=(60, 4)).astype(np.float32), rng.normal(size=(130, 4)).astype(np.float32)),
        "popular": popular(interactions, split, split.test),
        "cooccurrence": cooccurrence(interactions, split, split.test, Counting()),
    }
    results = evaluate(
        models,
        interactions,
        split,
        split.test,
        split_name="test",
        config=EvaluationConfig(ks=(5, 10), bootstrap=50),
        seed=0,
        command=f"python -m nqf.train {EVIL}",
    )
    card = Card(item_id="a", title=EVIL)
    report = Report(
        name=EVIL,
        summary="A run.",
        results=results,
        metrics=[
            {"stage": "joint", "step": 1, "time": 0.0, "loss": 2.0, "gradient_norm": 1.0},
            {"stage": "joint", "step": 2, "time": 1.0, "loss": None, "gradient_norm": None},
            {"stage": "joint", "step": 2, "time": 2.0, "valid/ndcg@10": 0.1},
        ],
        stages={"fields": {"wall_seconds": 1.0, "finished": "now"}},
        reconstruction={EVIL: {"mse": 0.5, "mean_mse": 1.0, "cosine": 0.7, "retrieval@1": 0.25, "count": 9}},
        validated_on="held-out items",
        map=Map(
            layouts={"vectors": rng.normal(size=(3, 2))},
            explained={"vectors": 0.5},
            titles=[EVIL, "b", "c"],
            popularity=np.array([0, 1, 2]),
            categories={"tags": ["x", "", "x"]},
            items=3,
        ),
        users=[User(heading=EVIL, history=[card], recommended=[card], target=card)],
        users_chosen="All of them.",
        changed=[f"name was '{EVIL}'"],
        settings=EVIL,
        data={"format": EVIL, "items": 12_345},
        warnings=[EVIL],
    )
    return dataclasses.replace(report, **changes)


@pytest.fixture(scope="module")
def page() -> str:
    return render(make_report())


def test_nothing_in_the_data_becomes_markup(page: str) -> None:
    assert "<script>alert" not in page
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(1)") >= 12
    assert "\x1b" not in page and "\u202e" not in page
    assert page.count("</script>") == 2  # the map's data and the page's own script
    data = json.loads(re.search(r'id="map-data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["titles"] == [plain(EVIL), "b", "c"]  # Escaped as JSON; the script makes text of it.
    assert "<img src=x" not in page and "{{ 7 * 7 }}" in page
    assert data["colors"]["tags"] == {"labels": ["x", "others and none"], "rest": True, "index": [0, 1, 0]}
    assert {tuple(point) for point in data["layouts"]["vectors"]} <= {(x, y) for x in range(1001) for y in range(1001)}


def test_figures_of_the_results_stand_in_the_table(page: str) -> None:
    report = make_report()
    for model, summary in report.results.models.items():
        row = re.search(rf"<tr class=\"\w+\"><td>{model}</td>(.*?)</tr>", page, re.DOTALL)[1]
        for segment in ("all", "warm", "cold"):
            assert f'data-value="{summary[segment]["hr@10"][0]}"' in row
    assert '<tr class="main"><td>joint' in page
    assert "12,345" in page and ">0.50<" in page and "held-out items" in page
    # The colors of the drawings are those of the page.
    assert page.count("<svg role") == 2 * 5
    assert "var(--c0)" in page and not re.search(r"#0[1234]0[0-4]0\d", page)


def test_a_run_with_little_has_a_small_page() -> None:
    report = make_report()
    models = {"popular": report.results.models["popular"]}
    results = dataclasses.replace(
        report.results,
        models=models,
        recommended={},
        protocol="legacy",
        frame=report.results.frame.drop("rank:joint", "rank:cooccurrence"),
    )
    page = render(
        make_report(results=results, metrics=[], stages={}, reconstruction={}, map=None, users=[], warnings=[])
    )
    assert page.count("<svg role") == 2 * 3 and 'id="map-data"' not in page and "flatters every model" in page
    assert '<tr class="main"><td>popular' in page
    for heading in ("Users", "Training", "What the Item Q-Former keeps", "What a reader must know"):
        assert f">{heading}<" not in page


def test_the_page_is_a_function_of_its_data() -> None:
    report = make_report()
    assert render(report) == render(dataclasses.replace(report))
    summary = report.results.models["popular"]
    other = {**summary, "all": {**summary["all"], "hr@10": [0.99, 0.98, 1.0]}}
    results = dataclasses.replace(report.results, models={**report.results.models, "popular": other})
    assert ".9900<small>[.9800, 1.0000]" in render(make_report(results=results))


def test_long_names_that_begin_alike_stay_apart() -> None:
    entry = {"mse": 0.5, "mean_mse": 1.0, "cosine": 0.7, "retrieval@1": 0.25, "count": 9}
    names = ["a very long name of a field, 1", "a very long name of a field, 2", "多语言"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = reconstruction_figure({name: entry for name in names})
    for svg in (drawn.broad, drawn.narrow):
        assert svg.count(">0.50<") == 3 and svg.count("…") == 2 and "多语言" in svg


def test_only_this_script_may_run(page: str) -> None:
    policy = re.search(r'Security-Policy" content="([^"]*)"', page)[1]
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert html.unescape(policy).endswith(f"script-src 'sha256-{digest}'")


@pytest.mark.skipif(NODE is None, reason="no node is installed, which parses the script of the page")
def test_the_script_is_javascript() -> None:
    script = Path(page_module.__file__).with_name("report.js")
    done = subprocess.run([NODE, "--check", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["report.css", "cards.css"])
def test_the_styles_are_balanced(name: str) -> None:
    """And every variable that they read is one that they set."""
    text = re.sub(r"/\*.*?\*/", "", Path(page_module.__file__).with_name(name).read_text(), flags=re.DOTALL)
    depth = 0
    for sign in re.sub(r'"[^"]*"', "", text):
        depth += (sign == "{") - (sign == "}")
        assert depth >= 0
    assert depth == 0
    given = set(re.findall(r"(--\w+):", text)) | {"--share"}
    assert set(re.findall(r"var\((--\w+)\)", text)) <= given
