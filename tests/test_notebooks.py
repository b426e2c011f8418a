"""Every notebook runs from top to bottom on a finished run, without warnings; outputs that are committed are small."""

import re
import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.slow


def test_there_are_seven() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == list("1234567")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_of_one_run_and_small(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # All cells were run once, in their order, or none was.
    assert [cell.execution_count for cell in cells] in ([*range(1, len(cells) + 1)], [None] * len(cells))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 500_000
    assert not re.search(r"/(home|root|tmp|Users)/", str(outputs))


@pytest.mark.ci
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NQF_RUN", str(shutil.copytree(tiny_run, tmp_path / "run")))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, 4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.text for output in outputs if output.get("name") == "stderr").splitlines()
    # Orbax complains of a machine that is busy with other tests.
    said = [line for line in said if line and not line.startswith("INFO:") and "Waiting for previous save" not in line]
    assert not said, "an unexplained warning:\n" + "\n".join(said)
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    if path.stem[0] == "7":
        assert "application/vnd.jupyter.widget-view+json" in kinds
        assert "★" in str(outputs)
    if path.stem[0] in "134":
        assert "image/png" in kinds
    if path.stem[0] in "234":
        assert any("nqf-cards" in output.get("data", {}).get("text/html", "") for output in outputs)
