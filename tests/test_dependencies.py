"""What the package imports is declared in pyproject.toml, and what is declared there is imported."""

import ast
import functools
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names_of(requirements: list[str]) -> set[str]:
    """Normalized names of distributions (PEP 503)."""
    found = (re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def imported() -> dict[str, set[str]]:
    """Third-party modules at the top of the import name, and the files of the package that import them."""
    modules: dict[str, set[str]] = {}
    for path in sorted((ROOT / "nqf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                root = name.split(".")[0]
                if root not in sys.stdlib_module_names and root != "nqf":
                    modules.setdefault(root, set()).add(str(path.relative_to(ROOT)))
    return modules


@functools.cache
def installed() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def distributions_of(module: str) -> set[str]:
    return names_of(installed().get(module, [module]))


def test_every_import_is_declared() -> None:
    declared = names_of(PROJECT["dependencies"])
    # Imported where they are asked for.
    for extra in PROJECT["optional-dependencies"].keys() - {"test", "bench", "docs"}:
        declared |= names_of(PROJECT["optional-dependencies"][extra])
    for module, files in imported().items():
        assert distributions_of(module) & declared, f"{', '.join(sorted(files))}: {module} is not in pyproject.toml"


def test_every_dependency_is_imported() -> None:
    used = set().union(*map(distributions_of, imported()))
    assert names_of(PROJECT["dependencies"]) <= used
