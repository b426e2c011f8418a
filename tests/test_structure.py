"""The structure that docs/architecture.md promises: imports point one way, and heavy packages stay in their place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nqf"
MODULES = sorted(PACKAGE.rglob("*.py"))
# A folder may import itself and what stands below it.
BELOW = {"config", "files", "ops", "data", "fields"}
ALLOWED = {
    "files": set(),
    "config": {"files"},
    "ops": {"config"},
    "data": {"config", "files", "net"},
    "fields": {"config", "files", "data"},
    # Loaders know arrays with names, and no Linen module.
    "pipelines": BELOW,
    "models": {"config", "ops", "pipelines"},
    "evaluation": BELOW | {"pipelines"},
    "interop": BELOW | {"models", "net"},
    # The trainer knows no stage.
    "training": {"config", "files", "pipelines", "ops"},
    "stages": BELOW | {"pipelines", "models", "evaluation", "interop", "training"},
    "serving": BELOW | {"pipelines", "models", "evaluation", "interop", "stages"},
    "tools": BELOW | {"pipelines", "models", "evaluation", "interop", "training", "stages", "serving", "cli", "net"},
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
        if name.startswith("nqf.") and name != "nqf.__version__":
            target = name.split(".")[1]
            assert target == part or target in ALLOWED[part], f"{path.name} imports {name}"


def test_tools_are_imported_by_commands_alone() -> None:
    for path in MODULES:
        part = path.relative_to(PACKAGE).parts[0]
        if part in ALLOWED and part != "tools" and path.name != "__main__.py":
            assert not any(name.startswith("nqf.tools") for name in imports_of(path)), path


def test_no_circle_of_files() -> None:
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    edges = {name: imports_of(path) & names.keys() - {name, "nqf"} for name, path in names.items()}
    # A package's own file may name its parts.
    edges = {name: {other for other in found if not other.startswith(f"{name}.")} for name, found in edges.items()}
    while free := {name for name, found in edges.items() if not found & edges.keys()}:
        edges = {name: found for name, found in edges.items() if name not in free}
    assert not edges, f"circles among {sorted(edges)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_replaced_and_locked_in_one_place(path: Path) -> None:
    where = str(path.relative_to(PACKAGE))
    if where in ("files.py", "training/checkpoint.py"):
        return
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    for name in ("os.replace", "os.rename", "fcntl.flock", "fcntl.lockf", "hashlib.file_digest"):
        # The field cache's keys of pictures are digests of another kind, which its format holds.
        assert name not in calls or (name, where) == ("hashlib.file_digest", "fields/hashing.py"), f"{where}: {name}"


def test_modules_take_their_section_of_the_configuration() -> None:
    for path in (PACKAGE / "models").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "nqf.config":
                assert "Config" not in {alias.name for alias in node.names}, path


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


def test_serving_is_not_training() -> None:
    code = (
        "import sys, nqf; nqf.Recommender\n"
        "heavy = {'grain', 'nqf.training.loop', 'nqf.training.optimizer'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
