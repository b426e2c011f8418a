"""The documentation is true: generated pages are current, quoted errors exist, links lead somewhere, commands run."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nqf.data.schema import schema_from_tree

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(bash|python|yaml) test(?: status=(\d+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> list:
    return [
        pytest.param(text, int(status or 0), id=f"{page.stem}-{number}")
        for page in [*PAGES, ROOT / "README.md"]
        for number, (found, status, text) in enumerate(BLOCK.findall(page.read_text()), 1)
        if found == kind
    ]


def test_configuration_page_is_current() -> None:
    generator = runpy.run_path(str(DOCS / "generate.py"))
    assert (DOCS / "configuration.md").read_text() == generator["page"](), "run: python docs/generate.py"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    if not page.is_file():
        pytest.skip(f"there is no {page.name} yet")
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def source_strings() -> list[str]:
    """Every text in nqf's source, … in place of what an f-string puts in."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""

    return [
        text(node)
        for path in (ROOT / "nqf").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Constant, ast.JoinedStr))
    ]


def test_quoted_errors_exist() -> None:
    quoted = re.findall(r"^### `(.*)`$", (DOCS / "faq.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    known = set(source_strings())
    assert not [message for message in quoted if message not in known]


def test_keys_of_the_migration_page_exist() -> None:
    """Dotted keys in backticks, with {a,b} for several, are keys of the configuration."""
    keys = set(re.findall(r"^\| `([a-z_.]+)` \|", (DOCS / "configuration.md").read_text(), re.MULTILINE))
    sections = {key.rsplit(".", depth)[0] for key in keys for depth in (1, 2, 3)}
    stages = ("item", "user", "joint", "candidates", "fields", "training", "data")
    pattern = rf"`((?:{'|'.join(stages)})\.[a-z_.]+(?:\{{[a-z_,]+\}})?)`"
    checked = 0
    for page in PAGES:
        for written in re.findall(pattern, page.read_text()):
            head, _, choices = written.rstrip("}").partition("{")
            for choice in choices.split(","):
                if Path(head + choice).suffix in (".py", ".json", ".parquet", ".csv", ".npz", ".md"):
                    continue
                assert head + choice in keys | sections, f"{page.name}: {head + choice}"
                checked += 1
    assert checked > 60


@pytest.mark.parametrize(("text", "status"), blocks("yaml"))
def test_schemas_load(text: str, status: int) -> None:
    assert schema_from_tree(yaml.safe_load(text)).fields


@pytest.fixture(scope="module")
def clone(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository with a finished quick start."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(tiny_run, folder / "runs" / "quickstart")
    for name in ("configs", "launch_scripts"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("text", "status"), blocks("bash"))
def test_commands_run(clone: Path, text: str, status: int) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-e", "-c", text], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("text", "status"), blocks("python"))
def test_python_runs(clone: Path, text: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    exec(compile(text, "docs", "exec"), {})
