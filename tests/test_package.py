"""The distribution: what the wheel and the sdist hold, that they work without a checkout, and what an editor sees."""

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import nqf

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The quick start, cut down to seconds.
SMALL = """
--data.synthetic.items 120 --data.synthetic.users 96 --data.synthetic.min-events 5 --data.synthetic.max-events 8
--data.synthetic.no-images --fields.text-width 8 --fields.category-width 8 --fields.text-features 200
--item.optim.epochs 1 --user.optim.epochs 1 --joint.optim.epochs 1 --evaluation.bootstrap 10
""".split()


def build(target: str, folder: Path, source: Path = ROOT) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def environment(folder: Path, wheel: Path) -> Path:
    """An environment with the wheel, in which the other packages are those of the tests; its folder of programs."""
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / "bin"
    install = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet", "--no-index"]
    subprocess.run([*install, "--no-deps", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Folders that a .pth file adds are not searched for further .pth files, so the checkout does not come along.
    paths = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "others.pth").write_text("\n".join(paths))
    return programs


def run(program: Path, *arguments: str, cwd: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=cwd, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def package_files() -> set[str]:
    """Files of the package and of the shipped configurations, where a wheel has them."""
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "nqf").rglob("*") if path.is_file()}
    configs = {f"nqf/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    return {name for name in files if "__pycache__" not in name} | configs


def test_the_wheel_holds_the_package_its_types_and_configurations_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(about))
    assert {name for name in names if ".dist-info/" not in name} == package_files()
    assert {"nqf/py.typed", "nqf/configs/quickstart.yaml", "nqf/configs/schemas/goodbooks.yaml"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert metadata["Version"] == nqf.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Keywords"] and metadata["Description-Content-Type"] == "text/markdown"


def test_the_sdist_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "sdist").mkdir()
    with tarfile.open(build("sdist", tmp_path / "sdist")) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "source", filter="data")
    assert not [name for name in names if "tests" in Path(name).parts]
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"} <= {Path(name).name for name in names}
    (source,) = (tmp_path / "source").iterdir()
    (tmp_path / "wheel").mkdir()
    again = build("wheel", tmp_path / "wheel", source)
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
@pytest.mark.ci
def test_the_wheel_trains_the_quick_start_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    programs, elsewhere = environment(tmp_path / "environment", wheel), tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(programs / "python", "-c", "import nqf; print(nqf.__file__)", cwd=elsewhere)
    assert where.startswith(str(tmp_path / "environment"))
    said = run(programs / "nqf", "train", "--config", "quickstart", *SMALL, cwd=elsewhere)
    assert f"taking {Path(where.strip()).parent / 'configs' / 'quickstart.yaml'}" in said
    results = json.loads((elsewhere / "runs" / "quickstart" / "eval" / "results.json").read_text())
    assert results["models"]["joint"]["all"] and results["provenance"]["command"].startswith("nqf train --config")
    assert "item-" in run(programs / "nqf", "recommend", "runs/quickstart", "--user", "user-00001", cwd=elsewhere)
    run(programs / "nqf", "report", "runs/quickstart", cwd=elsewhere)
    assert (elsewhere / "runs" / "quickstart" / "report.html").stat().st_size > 10_000


def test_an_editable_install_is_found_from_the_folder_above_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "wheel").mkdir()
    wheel = build("wheel:editable", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert [archive.read(name).decode().split() for name in files] == [[str(ROOT)]]
    programs, above = environment(tmp_path / "environment", wheel), tmp_path / "above"
    above.mkdir()
    # A checkout's folder has the package's name, and is no package itself.
    (above / "nqf").symlink_to(ROOT)
    text = run(programs / "python", "-c", "import nqf; print(nqf.__file__, nqf.__version__)", cwd=above)
    assert text.split() == [str(ROOT / "nqf" / "__init__.py"), nqf.__version__]
    assert run(programs / "nqf", "--version", cwd=above) == f"nqf {nqf.__version__}\n"


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    releases = re.findall(
        r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert releases[0] == (cited["version"], str(cited["date-released"]))
    assert nqf.__version__ == cited["version"], "a release has its entry in CHANGELOG.md and CITATION.cff"


def test_an_editor_sees_the_lazy_names(tmp_path: Path) -> None:
    assert set(nqf.__all__) <= set(dir(nqf))
    pytest.importorskip("pyright")
    file = tmp_path / "use.py"
    file.write_text("import nqf\nreveal_type(nqf.Recommender)\nreveal_type(nqf.load_qwen3)\n")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "--project", tmp_path]
    told = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)["generalDiagnostics"]
    assert 'is "type[Recommender]"' in told[0]["message"], told
    assert "-> tuple[Qwen3, " in told[1]["message"], told


def test_every_make_target_that_is_named_exists_and_ci_is_one_of_them() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run", ".pre-commit-config.yaml"):
        named = set(re.findall(r"(?:^|[`(])make ([a-z-]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, name
        assert "ci" in named or name.startswith(".pre"), name
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert ".ci/run" in [step.get("run") for step in workflow["jobs"]["ci"]["steps"]]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {repository["repo"] for repository in hooks} == {"local"}
