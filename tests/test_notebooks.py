"""Every notebook runs from top to bottom on a finished run, without warnings, and is committed without outputs."""

import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.slow


def test_there_are_six() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == list("123456")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


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
    if path.stem[0] in "134":
        assert "image/png" in kinds
    if path.stem[0] in "234":
        assert any("nqf-cards" in output.get("data", {}).get("text/html", "") for output in outputs)
