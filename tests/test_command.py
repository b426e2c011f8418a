"""The command `nqf`: its table, its help and errors, shipped configurations by name, and shell completion."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import nqf
from nqf import cli
from nqf.config import ConfigError, load_config
from nqf.stages.artifacts import StageError
from nqf.stages.assess import command_line

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("nqf", "nqf/data")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "guard(main, sys.argv" in path.read_text(encoding="utf-8")
]


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment)


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    return done.value.code, capsys.readouterr().err


def test_every_entry_point_is_a_command() -> None:
    assert {module for module, _ in cli.COMMANDS.values()} == {*ENTRY_POINTS, "nqf.tools.completion"}
    for name, (module, _) in cli.COMMANDS.items():
        assert callable(importlib.import_module(module).main), name


def test_help_lists_the_commands_a_line_each_and_imports_nothing_heavy() -> None:
    done = run("-c", "import sys; from nqf.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)")
    for name, (_, about) in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(about)}$", done.stdout, re.MULTILINE), name
    heavy = {"jax", "numpy", "polars", "tyro", "rich", "yaml", "nqf.config"}
    assert not heavy & set(done.stderr.split())
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("called", "program"),
    [
        ("/somewhere/bin/nqf", "nqf"),
        (r"nqf.exe", "nqf"),
        ("/somewhere/nqf/__main__.py", "python -m nqf"),
        ("/somewhere/nqf/data/__main__.py", None),
        ("/somewhere/nqf/train.py", None),
        ("/somewhere/pytest", None),
    ],
)
def test_help_says_how_the_command_was_called(called, program, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    for command in ("train", "evaluate", "data"):
        with pytest.raises(SystemExit) as done:
            cli.main([command, "--help"])
        assert done.value.code == 0
        assert (
            f"usage: {program} {command} " if program else f"usage: python -m nqf.{command} " in capsys.readouterr().out
        )


def test_the_package_and_the_modules_are_the_same_commands() -> None:
    one, other = run("-m", "nqf", "compare", "--help"), run("-m", "nqf.compare", "--help")
    assert one.returncode == other.returncode == 0
    assert one.stdout.replace("python -m nqf compare", "python -m nqf.compare") == other.stdout


def test_version(capsys) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"nqf {nqf.__version__}\n"


def test_an_unknown_command_suggests_the_nearest(capsys) -> None:
    code, error = failure(["recomend", "runs/x"], capsys)
    assert (code, error) == (2, "error: unknown command 'recomend'; did you mean 'recommend'?\n")
    code, error = failure(["xyzzy"], capsys)
    assert code == 2 and all(name in error for name in cli.COMMANDS)
    code, error = failure([], capsys)
    assert code == 2 and error.startswith("usage: ")


def test_errors_and_statuses_are_those_of_the_modules(tmp_path, capsys) -> None:
    code, error = failure(["evaluate", str(tmp_path / "none")], capsys)
    assert code == 1 and error.startswith(f"error: {tmp_path / 'none'}: no run here") and "--debug" in error
    code, error = failure(["evaluate", "x", "--splt", "test"], capsys)
    assert code == 2 and "--split" in error
    with pytest.raises(StageError):
        cli.main(["evaluate", str(tmp_path / "none"), "--debug"])


def test_the_recorded_command_can_be_typed_again(monkeypatch) -> None:
    main = sys.modules["__main__"]
    spec = importlib.util.spec_from_file_location("nqf.__main__", "nqf/__main__.py")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/nqf", "train", "--config", "quickstart"])
    monkeypatch.setattr(main, "__spec__", None)
    assert command_line() == "nqf train --config quickstart"
    monkeypatch.setattr(main, "__spec__", spec)
    assert command_line() == "python -m nqf train --config quickstart"


@pytest.mark.parametrize("given", ["quickstart", "quickstart.yaml", "configs/quickstart", "configs/quickstart.yaml"])
def test_a_shipped_configuration_is_found_by_name_and_that_is_said(given, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    found = cli.configuration(given)
    assert found == ROOT / "configs" / "quickstart.yaml"
    assert capsys.readouterr().err == f"{given}: not a file here; taking {found}, shipped with nqf\n"


def test_a_file_goes_before_a_shipped_configuration_and_other_paths_are_no_names(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs" / "quickstart.yaml"
    own.parent.mkdir()
    own.write_text("name: mine\n")
    assert load_config(cli.configuration("configs/quickstart.yaml")).name == "mine"
    assert capsys.readouterr().err == ""
    for path in ("elsewhere/quickstart.yaml", "../quickstart", str(tmp_path / "quickstart.yaml"), "schemas/goodbooks"):
        with pytest.raises(ConfigError, match="no such configuration file, and none of that name is shipped"):
            cli.configuration(path)
    with pytest.raises(ConfigError, match="did you mean 'goodbooks'"):
        cli.configuration("goodbook")


@pytest.mark.parametrize("given", ["parts", "studies/parts", "configs/studies/parts.yaml"])
def test_a_shipped_study_is_found_by_name(given, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.configuration(given, "studies") == ROOT / "configs" / "studies" / "parts.yaml"


def test_commands_take_shipped_configurations(tmp_path) -> None:
    for words in (["train", "--config", "quickstart", "--help", "data"], ["audit", "quikstart"], ["ablate", "part"]):
        done = run("-m", "nqf", *words, cwd=tmp_path)
        assert "taking" in done.stderr or "did you mean" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def bash(tmp_path_factory) -> Path:
    done = run("-m", "nqf", "completion", "bash")
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("completion") / "nqf.bash"
    path.write_text(done.stdout)
    return path


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash here")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ([""], set(cli.COMMANDS)),
        (["rec"], {"recommend"}),
        (["evaluate", "--spl"], {"--split"}),
        (["evaluate", "--split", ""], {"valid", "test"}),
        (["train", "--joint.optim.learning"], {"--joint.optim.learning-rate"}),
        (["data", "f"], {"fetch"}),
        (["data", "inspect", "--int"], {"--interactions"}),
    ],
)
def test_bash_completes_commands_options_and_choices(bash: Path, words: list[str], completed: set[str]) -> None:
    script = f"""
source {bash}
COMP_WORDS=(nqf {" ".join(word or "''" for word in words)}) COMP_CWORD={len(words)}
$(complete -p nqf | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) - {"-h", "--help"} == completed


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(shell: str) -> None:
    text = run("-m", "nqf", "completion", shell).stdout
    assert "nqf" in text and "--joint.optim.learning-rate" in text
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "train --help", "data inspect events.csv"])
def test_who_reads_may_leave(command: str, unbuffered: str, tmp_path: Path) -> None:
    """As before `| head`: no traceback and no error, and the status that a shell gives for SIGPIPE."""
    (tmp_path / "events.csv").write_text("user_id,item_id\n" + "u,i\n" * 9)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "nqf", *command.split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_broken_pipe_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: list[str]) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with tempfile.TemporaryFile("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        with pytest.raises(SystemExit) as status:
            cli.guard(main, [])
    assert status.value.code == 1 and "Broken pipe" in capsys.readouterr().err
