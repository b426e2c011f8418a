"""The structure that docs/architecture.md promises: imports point one way, and heavy packages stay in their place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nqf"
MODULES = sorted(PACKAGE.rglob("*.py"))
# A folder may import itself and what stands below it.
CORE = {"config", "files", "ops", "data", "fields", "pipelines", "models", "evaluation", "interop", "training"}
ALLOWED = {
    "config": {"files"},
    "files": set(),
    "ops": {"config"},
    "data": {"config", "files"},
    "fields": {"config", "files", "data"},
    "pipelines": {"config", "files", "ops", "fields", "data", "models"},
    "models": {"config", "files", "ops", "fields", "data"},
    "evaluation": {"config", "files", "ops", "fields", "data", "models"},
    "interop": {"config", "files", "ops", "fields", "data", "models"},
    "training": {"config", "files", "ops", "pipelines"},
    "stages": CORE,
    "serving": CORE | {"stages"},
    "tools": CORE | {"stages", "serving", "cli"},
}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part not in ALLOWED or path.name == "__main__.py":
        return  # An entry point may import everything.
    for name in imports_of(path):
        if name.startswith("nqf."):
            target = name.split(".")[1]
            assert target == part or target in ALLOWED[part], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_have_one_place(path: Path) -> None:
    where = str(path.relative_to(PACKAGE))
    for name in imports_of(path):
        root = name.split(".")[0]
        assert root != "torch", f"{where} imports torch"
        assert root != "pickle" or where == "interop/unirec/checkpoint.py", f"{where} imports pickle"
        if root == "orbax":
            assert where == "training/checkpoint.py"
        if root == "grain":
            assert where.startswith("pipelines/")
        if root in ("transformers", "tokenizers"):
            assert where == "interop/tokenizer.py"


def test_import_is_light() -> None:
    code = (
        "import sys, nqf\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'jax'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_recommender_needs_no_torch_transformers_or_matplotlib() -> None:
    code = (
        "import sys, nqf; nqf.Recommender; nqf.load_qwen3\n"
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
