"""The report's page from hand-made results: what it says, and that nothing in the data breaks out of it."""

import dataclasses
import json
import re

import numpy as np
import pytest
from hand_made import random_interactions

from nqf.config import EvaluationConfig
from nqf.evaluation.baselines import cooccurrence, popular
from nqf.evaluation.results import evaluate
from nqf.tools.report.cards import Card
from nqf.tools.report.page import Map, Report, User, render

EVIL = "</script><script>alert(1)</script>"


def make_report(**changes: object) -> Report:
    interactions, split = random_interactions(1)
    rng = np.random.default_rng(0)
    models = {
        "joint": (rng.normal(size=(60, 4)).astype(np.float32), rng.normal(size=(130, 4)).astype(np.float32)),
        "popular": popular(interactions, split, split.test),
        "cooccurrence": cooccurrence(interactions, split, split.test),
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


def test_nothing_in_the_data_becomes_markup() -> None:
    page = render(make_report())
    assert "<script>alert" not in page
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(1)") > 8
    assert page.count("</script>") == 2  # the map's data and the page's own script
    data = json.loads(re.search(r'id="map-data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["titles"] == [EVIL, "b", "c"]
    assert data["colors"]["tags"] == {"labels": ["x", "others and none"], "rest": True, "index": [0, 1, 0]}
    assert {tuple(point) for point in data["layouts"]["vectors"]} <= {(x, y) for x in range(1001) for y in range(1001)}


def test_figures_of_the_results_stand_in_the_table() -> None:
    report = make_report()
    page = render(report)
    for model, summary in report.results.models.items():
        row = re.search(rf"<tr class=\"\w+\"><td>{model}</td>(.*?)</tr>", page)[1]
        for segment in ("all", "warm", "cold"):
            assert f'data-value="{summary[segment]["hr@10"][0]}"' in row
    assert '<tr class="main"><td>joint' in page
    assert "12,345" in page and ">0.50<" in page and "held-out items" in page
    # The colors of the drawings are those of the page.
    assert page.count("<svg role") == 5
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
    assert page.count("<svg role") == 3 and 'id="map-data"' not in page and "flatters every model" in page
    assert '<tr class="main"><td>popular' in page
    for heading in ("Users", "Training", "What the Item Q-Former keeps", "What a reader must know"):
        assert f">{heading}<" not in page


@pytest.mark.parametrize("changed", ["joint", "popular"])
def test_the_page_is_a_function_of_its_data(changed: str) -> None:
    report = make_report()
    assert render(report) == render(dataclasses.replace(report))
    summary = report.results.models[changed]
    other = {**summary, "all": {**summary["all"], "hr@10": [0.99, 0.98, 1.0]}}
    results = dataclasses.replace(report.results, models={**report.results.models, changed: other})
    assert ".9900<small>[.9800, 1.0000]" in render(make_report(results=results))
